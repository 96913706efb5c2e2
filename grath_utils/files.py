"""Files: where they are, how they are written whole, and how long work is kept for resuming.

Every file is written aside and then renamed, so that a reader never sees half of one, whatever
happened to the writer (POSIX ``rename`` is atomic within a file system).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import platformdirs
import yaml

from grath_utils.errors import KIND_NAMES, ConfigError, DataError, RunError, UsageError, brief

# --- places --------------------------------------------------------------------------------------


def user_path(name: str | os.PathLike[str]) -> Path:
    """Return the absolute path of what a user named, where ``~`` is the home folder."""
    return Path(os.path.realpath(os.path.expanduser(name)))


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

    Raises:
        UsageError: there is no home folder, and ``GRATH_CACHE`` is not set.
    """
    try:
        name = os.environ.get("GRATH_CACHE") or platformdirs.user_cache_dir("grath")
        return Path(name).expanduser().resolve()
    except RuntimeError as error:
        raise UsageError(
            "no home folder is known here; set the environment variable GRATH_CACHE to a folder "
            "for the cache"
        ) from error


def write_cache(path: Path, value: Any) -> None:
    """Keep a value in the cache where that can be written; otherwise it only costs time again."""
    with suppress(RunError, UsageError):
        write_json(path, value)


def mirror_dir() -> Path | None:
    """Return the benchmark mirror that ``GRATH_MIRROR`` names, or None where it is unset.

    Raises:
        UsageError: the variable names a folder that does not exist.
    """
    name = os.environ.get("GRATH_MIRROR")
    if not name:
        return None
    folder = user_path(name)
    if not folder.is_dir():
        raise UsageError(
            f"GRATH_MIRROR names {name}, which is not a folder; point it to a benchmark mirror, "
            "or unset it"
        )
    return folder


# --- whole files ---------------------------------------------------------------------------------


PARTIAL = ".grath-partial"  # how the name of a folder with something half-written ends


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a path beside ``target``; the file or folder made there becomes ``target`` on success.

    That is one rename: whenever the writer is killed, the old one or the new one is there, whole. A
    folder with something in it is never replaced. A symbolic link stays, and what it names is
    written.

    Raises:
        UsageError: see :func:`check_place`.
        RunError: the disk is full or the place cannot be written to.
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
    """Check that a command may make a folder, see :func:`check_place`; an empty one may be there.

    Raises:
        UsageError: something is there that would be lost.
    """
    check_place(target)
    if target.is_file():
        raise UsageError(f"{target} is a file; name a folder")


def check_output(
    target: Path, read: Callable[[Path], Any], keys: Iterable[str], inputs: Iterable[Path] = ()
) -> None:
    """Check, before the work, that a command may write a file: at most its own is replaced.

    Args:
        target: the file to write.
        read: :func:`read_json` or :func:`read_jsonl`, as such a file is read.
        keys: what each object in such a file has.
        inputs: files that the command reads.

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
        if all(isinstance(row, dict) and set(keys) <= row.keys() for row in rows):
            return
    raise UsageError(
        f"{target} exists and was not written by this command, so it stays; choose another output"
    )


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
    left = list(filter(Path.is_dir, Path(folder).rglob(f".*{PARTIAL}")))
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


def read_json(path: Path, form: Any = Any) -> Any:
    """Read a JSON file of a form that :func:`check_form` describes.

    Raises:
        DataError: the file is missing, not UTF-8, not JSON or not of this form; the message says
            where.
    """
    value = parse_json(read_text(path), str(path))
    check_form(value, form, str(path), MAKE_AGAIN)
    return value


def read_jsonl(path: Path, form: Any = Any) -> list[dict[str, Any]]:
    """Read a JSONL file into a list of objects of one form; blank lines are ignored.

    Raises:
        DataError: the file cannot be read, or a line is not such a JSON object; the message names
            it.
    """
    rows = []
    # Not splitlines(): it would also split at U+2028 and other separators inside a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = parse_json(line, str(path), number)
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}: expected a JSON object such as "
                f'{{"question": "..."}}, found {type(row).__name__}'
            )
        check_form(row, form, f"{path}, line {number}", MAKE_AGAIN)
        rows.append(row)
    return rows


MAKE_AGAIN = ". It was changed or damaged: restore the file, or delete it to have it made again"


def check_form(value: Any, form: Any, where: str, advice: str = "", key: str = "") -> None:
    """Check that a value which a file of ours holds is as this program writes it.

    A form is a type, where float is any finite number; a list of one form for all entries, or of
    one for each; a mapping of the keys that must be there, with ``str`` for all others; and
    ``(form, None)`` where null does as well.

    Raises:
        DataError: names ``where``, the key, and what was found and expected there.
    """
    if form is Any or (isinstance(form, tuple) and value is None):
        return
    form = form[0] if isinstance(form, tuple) else form
    kind = form if isinstance(form, type) else type(form)
    good = isinstance(value, {float: (int, float), Path: str}.get(kind, kind))
    if kind is Path:
        good = good and is_text(value)
    if kind in (int, float):
        good = good and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not good or (isinstance(form, list) and len(form) > 1 and len(value) != len(form)):
        found = f'"{key}" is {brief(value)}' if key else f"found {brief(value)}"
        raise DataError(f"{where}: {found}; expected {KIND_NAMES[kind]}{advice}")
    if isinstance(form, list):
        for i, entry in enumerate(value):
            check_form(entry, form[i % len(form)], where, advice, f"{key}[{i}]")
    elif isinstance(form, dict):
        for name in form | value if str in form else form:
            if name is not str:
                inner = form.get(name, form.get(str))
                # What is missing is no more than null.
                check_form(value.get(name), inner, where, advice, f"{key}.{name}".lstrip("."))


def is_text(value: str) -> bool:
    """Return False for what no file's name or content can hold: NUL, half a surrogate pair."""
    return not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value)


def parse_json(text: str, where: str = "", line: int | None = None) -> Any:
    """Return the value of JSON text that stands in the file ``where`` (on one ``line`` of it).

    Raises:
        DataError: it is not JSON, gives a key twice, or holds what we could not write again: NaN,
            infinity, a number of thousands of digits, half of a surrogate pair, endless brackets.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_doubled_keys)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
        return value
    except json.JSONDecodeError as error:
        line, reason = line or error.lineno, error.msg
    except UnicodeEncodeError:
        reason = "half of a surrogate pair, which is no character"
    except RecursionError:
        reason = "too many brackets within brackets"
    except ValueError as error:
        not_finite = "JSON compliant" in str(error)
        reason = "NaN or infinity" if not_finite else str(error).partition(";")[0]
    place = f"{where}, line {line}: " if where and line else where and f"{where}: "
    raise DataError(f"{place}not valid JSON ({reason})")


def _without_doubled_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'"{next(k for k in row if keys.count(k) > 1)}" is given twice')
    return row


def read_text(path: Path) -> str:
    """Read a UTF-8 file as it is, line ends included.

    Raises:
        DataError: the file is missing, cannot be read or is not UTF-8.
    """
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
        ConfigError: the file cannot be read, or see :func:`parse_yaml`.
    """
    try:
        return parse_yaml(read_text(path), str(path))
    except DataError as error:
        raise ConfigError(str(error)) from error


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of YAML text that stands at ``where``.

    Raises:
        ConfigError: it is not YAML, gives a key twice, or has endless brackets.
    """
    try:
        return yaml.load(text, Loader=_Yaml)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", "no text")
        if not isinstance(error, yaml.constructor.ConstructorError):
            reason = f"not valid YAML ({reason})"
        raise ConfigError(f"{where}{line}: {reason}") from error
    # What PyYAML lets through: endless brackets or digits, and values that do not fit their !!tag.
    except (RecursionError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(f"{where}: not valid YAML ({str(error).partition(';')[0]})") from error


class _Yaml(yaml.SafeLoader):
    """YAML 1.2, as people read it: 010 is ten and 5e-4 a number; 1:30 and 2020-01-01 are none.

    A key that is given twice is an error: by itself, the later value would replace the earlier one.
    """

    # PyYAML's own rules of YAML 1.1, by the first character.
    yaml_implicit_resolvers: ClassVar = {
        first: [rule for rule in rules if rule[0].rpartition(":")[2] in ("null", "bool", "merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            problem = None
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be one word"
            elif key.value in seen:
                problem = f'"{key.value}" is given twice'
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_NUMBER = r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf)$|\.(nan|NaN)$"
_FIRST = list("-+.0123456789")
_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), _FIRST)
_Yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_NUMBER), _FIRST)
_Yaml.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


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

        A journal of other work is moved to ``NAME.old`` (``NAME.old2``, ...) with a warning: its
        parts belong to other results.
        """
        if self.path is None or not self.path.is_file():
            return {}
        whole: list[tuple[bytes, dict[str, Any]]] = []
        for raw in self.path.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(raw)
            except (ValueError, RecursionError):
                break
            if not raw.endswith(b"\n") or not isinstance(row, dict):
                break
            whole.append((raw, row))
        head, *parts = [row for _, row in whole] or [{}]
        ours = head.get("identity") == self.identity
        ours &= all(row.keys() == {"part", "rows"} for row in parts)
        if not whole:  # killed in its first line?
            ours = self._head().startswith(self.path.read_bytes())
        if not ours:
            names = (self.path.with_name(f"{self.path.name}.old{n}") for n in ("", *range(2, 1000)))
            aside = next(name for name in names if not name.exists())
            os.replace(self.path, aside)
            warnings.warn(
                f"{self.path} was left by work with other inputs or settings; it is now "
                f"{aside.name}, and the work starts from the beginning",
                stacklevel=2,
            )
            return {}
        # Append after the last whole line, or the next one would be joined to a torn one.
        with open(self.path, "r+b") as handle:
            handle.truncate(sum(len(raw) for raw, _ in whole))
        return {row["part"]: row["rows"] for row in parts}

    def _head(self) -> bytes:
        return jsonl_line({"identity": self.identity}).encode()

    def append(self, part: int, rows: Sequence[Any]) -> None:
        """Add a finished part and flush it to the disk.

        Raises:
            RunError: the disk is full or the place cannot be written to; or other work has begun to
                write the same output.
        """
        if self.path is None:
            return
        with explained_write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as handle:
                handle.seek(0)
                head = handle.readline()
                if not head:
                    handle.write(self._head())
                elif head != self._head():
                    raise RunError(
                        f"{self.path} is that of other work now: does another process write the "
                        "same output? Let it end, then run the same command again"
                    )
                handle.write(jsonl_line({"part": part, "rows": list(rows)}).encode())
                handle.flush()
                os.fsync(handle.fileno())

    def remove(self) -> None:
        """Delete the journal once the output is whole."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
