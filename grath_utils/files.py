"""Files: where they are, how they are written whole, and how long work is kept for resuming.

Every file is written aside and then renamed, so that a reader never sees half of one, whatever
happened to the writer (POSIX ``rename`` is atomic within a file system).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import yaml

from grath_utils.errors import ConfigError, DataError, RunError, UsageError

# --- places --------------------------------------------------------------------------------------


def data_dir() -> Path:
    """Return the folder with the project's own data (questions, probe, retention set)."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "data", package / "own_data"):  # a checkout, or a wheel
        if (folder / "questions.jsonl").is_file():
            return folder
    raise UsageError(
        f"the project's data folder is missing (looked in {package.parent / 'data'}): "
        "install from a checkout, or restore the folder data/ with git"
    )


def notebooks_dir() -> Path | None:
    """Return the folder with the numbered notebooks, or None outside a checkout."""
    folder = Path(__file__).resolve().parent.parent / "notebooks"
    return folder if folder.is_dir() else None


def cache_dir() -> Path:
    """Return the folder for converted models and other re-creatable files.

    ``GRATH_CACHE`` if set, else the platform's cache folder. It may not exist yet.
    """
    override = os.environ.get("GRATH_CACHE")
    default = Path(platformdirs.user_cache_dir("grath"))
    return Path(override).expanduser().resolve() if override else default


def mirror_dir() -> Path | None:
    """Return the benchmark mirror that ``GRATH_MIRROR`` names, or None where it is unset.

    Raises:
        UsageError: the variable names a folder that does not exist.
    """
    name = os.environ.get("GRATH_MIRROR")
    if not name:
        return None
    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        raise UsageError(
            f"GRATH_MIRROR names {name}, which is not a folder; point it to a benchmark mirror, "
            "or unset it"
        )
    return folder


# --- whole files ---------------------------------------------------------------------------------


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a path beside ``target`` to write to; it takes ``target``'s place only on success.

    Works for a file and for a whole folder. On any error the target is left as it was.

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
            for file in filter(Path.is_file, [partial, *partial.rglob("*")]):
                # Windows refuses to flush a file that was opened for reading only.
                with open(file, "r+b") as handle:
                    os.fsync(handle.fileno())
            if target.is_dir():
                # A folder cannot be replaced in one step: move the old one out of the way first.
                os.replace(target, scratch / "replaced")
            os.replace(partial, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def explained_write_errors(target: Path) -> Iterator[None]:
    """Turn an error of writing ``target`` into one that says what to do.

    Libraries that save models raise errors of many kinds when the disk is full, so any error that
    comes while no space is left is explained, not ``OSError`` alone.

    Raises:
        RunError: the disk is full or the place cannot be written to.
    """
    try:
        yield
    except Exception as error:
        full = "no space left" in str(error).lower()
        with suppress(OSError):
            full |= shutil.disk_usage(Path(target).parent).free < 1 << 15
        if isinstance(error, RunError) or not (full or isinstance(error, OSError)):
            raise
        reason = "No space left on device" if full else getattr(error, "strerror", None) or error
        raise RunError(
            f"cannot write {target}: {reason}. Nothing half-written will be read; free some space "
            "or fix the permissions, then run the same command again"
        ) from error


def sweep_partials(folder: Path) -> int:
    """Remove what a killed writer left aside in ``folder`` (and below); return how many."""
    left = []
    for path in filter(Path.is_dir, Path(folder).rglob(".*.*")):
        name = path.name[1:].rpartition(".")[0]  # ``.NAME.RANDOM``, with at most these in it
        if all(child.name in (name, "replaced") for child in path.iterdir()):
            left.append(path)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return len(left)


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
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file into a list of objects; blank lines are ignored.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object; the message names it.
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


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not YAML or gives a key twice.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_NoDoubledKeys)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text; save the file as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        doubled = isinstance(error, yaml.constructor.ConstructorError)
        reason = error.problem if doubled else "not valid YAML"
        raise ConfigError(f"{path}{line}: {reason}") from error


class _NoDoubledKeys(yaml.SafeLoader):
    """YAML itself lets a later key replace an earlier one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f'"{key.value}" is given twice'
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)


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


# --- the journal ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Journal:
    """The finished parts of long work, one JSON line each; the first line says whose they are.

    A line is on the disk before the next part begins, so a killed process loses only the part that
    it was working on. Only one process may append.
    """

    path: Path | None
    """None: nothing is kept."""
    identity: str
    """A fingerprint of whatever must be equal for the parts to be used again."""

    @staticmethod
    def beside(out: Path | None, identity: str) -> Journal:
        """Return the journal of an output file: ``OUT.journal``."""
        return Journal(out and out.with_name(f"{out.name}.journal"), identity)

    def read(self) -> dict[int, list[Any]]:
        """Return the finished parts by number; drop a line that a killed writer left unfinished.

        A journal of other inputs is moved to ``NAME.old`` with a warning: its parts belong to
        other results.
        """
        if self.path is None or not self.path.is_file():
            return {}
        whole: list[tuple[bytes, dict[str, Any]]] = []
        for raw in self.path.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(raw)
            except (json.JSONDecodeError, UnicodeDecodeError):
                break
            if not raw.endswith(b"\n") or not isinstance(row, dict):
                break
            whole.append((raw, row))
        head = whole[0][1] if whole else {}
        if head.get("identity") != self.identity or not all("part" in row for _, row in whole[1:]):
            if self.path.stat().st_size == 0:
                self.path.unlink()
                return {}
            aside = self.path.with_name(f"{self.path.name}.old")
            os.replace(self.path, aside)
            warnings.warn(
                f"{self.path} was left by work with other inputs; it is now {aside.name}, and the "
                "work starts from the beginning",
                stacklevel=2,
            )
            return {}
        # Append after the last whole line, or the next one would be joined to a torn one.
        with open(self.path, "r+b") as handle:
            handle.truncate(sum(len(raw) for raw, _ in whole))
        return {row["part"]: row["rows"] for _, row in whole[1:]}

    def append(self, part: int, rows: Sequence[Any]) -> None:
        """Add a finished part and flush it to the disk.

        Raises:
            RunError: the disk is full or the place cannot be written to.
        """
        if self.path is None:
            return
        with explained_write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as handle:
                if handle.tell() == 0:
                    handle.write(jsonl_line({"identity": self.identity}).encode())
                handle.write(jsonl_line({"part": part, "rows": list(rows)}).encode())
                handle.flush()
                os.fsync(handle.fileno())

    def remove(self) -> None:
        """Delete the journal once the output is whole."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
