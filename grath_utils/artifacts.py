"""Files that appear whole or not at all, and fingerprints of what is in them.

Every file of a run directory is written aside and then renamed, so that a reader never sees half
of one, whatever happened to the writer (POSIX ``rename`` is atomic within a file system).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grath_utils.errors import DataError, RunError


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a path beside ``target`` to write to; it takes ``target``'s place only on success.

    Works for a file and for a whole folder. On any error the target is left as it was and the
    half-written thing is removed.

    Raises:
        RunError: the disk is full or the place cannot be written to.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise RunError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    partial = scratch / target.name
    try:
        with explained_write_errors(target):
            yield partial
            _sync(partial)
            if target.is_dir():
                # A folder cannot be replaced in one step: move the old one out of the way first.
                os.replace(target, scratch / "replaced")
            os.replace(partial, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def explained_write_errors(target: Path) -> Iterator[None]:
    """Turn an error of writing ``target`` into one that says what to do.

    Libraries that save models raise errors of many kinds when the disk is full, so besides
    ``OSError`` any error counts that comes while no space is left.

    Raises:
        RunError: the disk is full or the place cannot be written to.
    """
    try:
        yield
    except Exception as error:
        full = "no space left" in str(error).lower() or _no_space_left(Path(target).parent)
        if isinstance(error, RunError) or not (full or isinstance(error, OSError)):
            raise
        reason = "No space left on device" if full else getattr(error, "strerror", None) or error
        raise RunError(
            f"cannot write {target}: {reason}. Nothing half-written will be read; free some space "
            "or fix the permissions, then run the same command again"
        ) from error


def _no_space_left(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < 1 << 15
    except OSError:
        return False


def _sync(path: Path) -> None:
    """Flush a file, or every file of a folder, to the disk."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        # Windows refuses to flush a file that was opened for reading only.
        with open(file, "r+b") as handle:
            os.fsync(handle.fileno())


def sweep_partials(folder: Path) -> int:
    """Remove what a killed writer left aside in ``folder`` (and below); return how many."""
    left = [p for p in Path(folder).rglob(".*.*") if p.is_dir() and _is_scratch(p)]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return len(left)


def _is_scratch(path: Path) -> bool:
    """Tell a folder made by :func:`atomic_path`: ``.NAME.RANDOM``, holding at most NAME."""
    name = path.name[1:].rsplit(".", 1)[0]
    return all(child.name in (name, "replaced") for child in path.iterdir())


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically. NaN and infinity are refused."""
    write_text(path, "".join(jsonl_line(row) for row in rows))


def jsonl_line(row: Mapping[str, Any]) -> str:
    """Return ``row`` as one line of JSONL, newline included."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing, not UTF-8 or not JSON; the message says where.
    """
    text = _read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file into a list of objects; blank lines are ignored.

    Raises:
        DataError: the file is missing or not UTF-8, or a line is not a JSON object; the message
            names the line.
    """
    rows = []
    # Not splitlines(): it would also split at U+2028 and other separators inside a JSON string.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}: expected a JSON object such as "
                f'{{"question": "..."}}, found {type(row).__name__}'
            )
        rows.append(row)
    return rows


def _read_text(path: Path) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, expected a file") from None
    except UnicodeDecodeError as error:
        line = Path(path).read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


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
