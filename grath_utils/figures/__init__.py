"""Pictures: of what was measured (plots) and of ideas (drawings)."""
