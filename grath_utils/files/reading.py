"""Text, JSON and JSONL as they are read: what is wrong is named with its file, line and key."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from grath_utils.errors import KIND_NAMES, DataError, brief


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


def read_text(path: Path, errors: str = "strict") -> str:
    """Read a UTF-8 file as it is, line ends included; ``errors`` as in :meth:`bytes.decode`.

    Raises:
        DataError: the file is missing, cannot be read or is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig", errors)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, expected a file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
