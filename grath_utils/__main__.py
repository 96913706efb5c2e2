"""``python -m grath_utils``."""

import sys

if __name__ == "__main__":
    try:
        from grath_utils.cli import main

        code = main()
    except KeyboardInterrupt:  # before the command began
        code = 130
    sys.exit(code)
