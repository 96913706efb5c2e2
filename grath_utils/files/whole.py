"""Files that appear whole or not at all, and in whose place nothing else is lost.

Every file is written aside and then renamed, so that a reader never sees half of one, whatever
happened to the writer (POSIX ``rename`` is atomic within a file system).
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from grath_utils.errors import DataError, RunError, UsageError

PARTIAL = ".grath-partial"  # how the name of a folder with something half-written ends
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, or none left to this user
_numbers = "|".join(map(str, FULL))
SAID_FULL = re.compile(rf"(?i)no space left|file too large|quota exceeded|os error ({_numbers})\b")


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a path beside ``target``; the file or folder made there becomes ``target`` on success.

    That is one rename: whenever the writer is killed, the old one or the new one is there, whole. A
    folder with something in it is never replaced. A symbolic link stays, and what it names is
    written. Raises what :func:`check_place` and :func:`explained_write_errors` raise.
    """
    target = Path(os.path.realpath(target))
    check_place(target)
    with explained_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(PARTIAL, f".{target.name[:30]}.", target.parent))
        partial = scratch / target.name
        try:
            yield partial
            for file in filter(Path.is_file, [partial, *partial.rglob("*")]):
                # Windows refuses to flush a file that was opened for reading only.
                with open(file, "r+b") as handle:
                    os.fsync(handle.fileno())
            if partial.is_dir() and target.is_dir():
                target.rmdir()  # it is empty, and Windows replaces no folder
            os.replace(partial, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def check_place(target: Path) -> None:
    """Check that something can be written to ``target`` without the loss of anything else.

    Raises:
        UsageError: a folder with something in it is there, or a file that is write-protected or
            special (a device, a pipe); or a part of its path is a file, or write-protected.
    """
    target = Path(target)
    with explained_write_errors(target):
        above = next(filter(Path.exists, target.absolute().parents), target)
        if above.is_file():
            raise UsageError(f"cannot write {target}: {above} is a file, not a folder")
        if not os.access(above, os.W_OK):
            raise UsageError(f"cannot write {target}: {above} is write-protected")
        if target.is_dir():
            if any(target.iterdir()):
                raise UsageError(
                    f"{target} is a folder that is not empty, and stays; choose another"
                )
        elif target.exists() and (not target.is_file() or not target.stat().st_mode & 0o222):
            kind = "write-protected" if target.is_file() else "no ordinary file"
            raise UsageError(f"{target} is {kind}, and stays as it is; choose another file")


def check_new_folder(target: Path) -> None:
    """Check that a command may make a folder, see :func:`check_place`, or use an empty one."""
    check_place(target)
    if target.is_file():
        raise UsageError(f"{target} is a file; name a folder")


def check_output(
    target: Path,
    read: Callable[[Path], Any],
    keys: Iterable[str],
    inputs: Iterable[Path] = (),
    allowed: Iterable[str] | None = None,
) -> None:
    """Check, before the work, that a command may write a file: at most its own is replaced.

    Each object in such a file has the ``keys``, as :func:`read_json` or :func:`read_jsonl` finds,
    and, where ``allowed`` is given, no others than these. ``inputs`` are files that the command
    reads.

    Raises:
        UsageError: see :func:`check_place`; or it is a folder, an input (by whatever name), or a
            file of another kind.
    """
    if os.path.isdir(target):
        raise UsageError(f"{target} is a folder, and stays; name a file")
    check_place(target)
    if not target.exists():
        return
    if any(path.exists() and path.samefile(target) for path in inputs):
        raise UsageError(f"{target} is read by this command, and stays; choose another output")
    with suppress(DataError):
        rows = read(target) if target.stat().st_size else []
        rows = rows if isinstance(rows, list) else [rows]
        found = [row.keys() for row in rows if isinstance(row, dict)]
        known = allowed is None or set().union(*found) <= set(allowed)
        if known and len(found) == len(rows) and all(set(keys) <= each for each in found):
            return
    raise UsageError(
        f"{target} exists and was not written by this command, so it stays; choose another output"
    )


@contextmanager
def explained_write_errors(target: Path) -> Iterator[None]:
    """Turn an error of writing ``target`` into one that says what to do; let any other through.

    Of writing it are: a full disk, whatever raises while it is (libraries that save models raise
    errors of many kinds then), and an ``OSError`` that names the target, something on the way to
    it or below it, or what is half-written aside.

    Raises:
        RunError: the disk is full or the place cannot be written to.
    """
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in FULL or bool(SAID_FULL.search(str(error)))
        with suppress(OSError):
            full |= shutil.disk_usage(Path(target).parent).free < 1 << 15
        if isinstance(error, RunError) or not (full or _is_about(error, Path(target))):
            raise
        reason = "No space left on device" if full else getattr(error, "strerror", None) or error
        raise RunError(
            f"cannot write {target}: {reason}. Nothing half-written will be read; free some space "
            "or fix the permissions, then run the same command again"
        ) from error


def _is_about(error: Exception, target: Path) -> bool:
    """Return True for an ``OSError`` whose file lies at the target, above or below it, or aside."""
    if not isinstance(error, OSError) or not isinstance(error.filename, (str, bytes, os.PathLike)):
        return False
    target, path = (Path(os.path.realpath(os.fsdecode(name))) for name in (target, error.filename))
    aside = path.relative_to(target.parent) if path.is_relative_to(target.parent) else Path()
    return (
        path.is_relative_to(target)
        or target.is_relative_to(path)
        or bool(aside.parts and aside.parts[0].endswith(PARTIAL))
    )


def sweep_partials(folder: Path) -> None:
    """Remove what a killed writer left aside in ``folder`` (and below)."""
    for path in list(filter(Path.is_dir, folder.rglob(f".*{PARTIAL}"))):
        shutil.rmtree(path, ignore_errors=True)


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


def write_cache(path: Path, value: Any) -> None:
    """Keep a value in the cache where that can be written; otherwise it only costs time again."""
    with suppress(RunError, UsageError, OSError):
        write_json(path, value)
