"""Short hashes of values, files and folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def fingerprint(value: Any) -> str:
    """Return a short stable hash (16 hex digits of SHA-256) of a JSON-serialisable value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fingerprint_folder(folder: Path, patterns: Iterable[str] = ("*",)) -> str:
    """Return a short hash of the names and contents of the files that match ``patterns``."""
    files = sorted({p for pattern in patterns for p in Path(folder).glob(pattern) if p.is_file()})
    return fingerprint([(p.name, sha256_file(p)) for p in files])
