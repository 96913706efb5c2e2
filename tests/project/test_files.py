"""Files appear whole or not at all; reading names file and line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from grath_utils.errors import DataError, RunError
from grath_utils.files import (
    Journal,
    atomic_path,
    explained_write_errors,
    fingerprint,
    fingerprint_folder,
    read_json,
    read_jsonl,
    sweep_partials,
    write_json,
    write_jsonl,
    write_text,
)


def test_json_and_jsonl_round_trip(tmp_path: Path) -> None:
    rows = [{"a": "ü\u2028x", "b": [1, 2.5]}, {"a": "", "b": []}]
    write_jsonl(tmp_path / "deep" / "x.jsonl", rows)
    assert read_jsonl(tmp_path / "deep" / "x.jsonl") == rows
    write_json(tmp_path / "x.json", rows)
    assert read_json(tmp_path / "x.json") == rows


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_numbers_are_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"score": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (KeyError("mine"), KeyError, "mine"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            RunError,
            r"cannot write .*x\.txt: No space left on device.*free some",
        ),
    ],
)
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: Exception, expected: type[Exception], message: str
) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with pytest.raises(expected, match=message), atomic_path(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_really_full_device_raises(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No space left"), atomic_path(tmp_path / "x") as partial:
        partial.write_text("something")
        with open("/dev/full", "w") as full:
            full.write("x")


def test_any_error_while_no_space_is_left_is_explained(tmp_path: Path, monkeypatch) -> None:
    """Model libraries raise errors of many kinds on a full disk, few of them OSError."""
    odd = RuntimeError("[enforce fail at inline_container.cc] unexpected pos 24576 vs 24468")
    for free, expected, message in (
        (4096, RunError, "No space left"),
        (1 << 40, RuntimeError, "unexpected"),
    ):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr("shutil.disk_usage", lambda folder, usage=usage: usage)
        with pytest.raises(expected, match=message), explained_write_errors(tmp_path / "x"):
            raise odd


def test_folders_are_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    for text in ("one", "two"):
        with atomic_path(target) as partial:
            partial.mkdir()
            (partial / text).write_text(text)
    assert [p.name for p in target.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_killed_writer_leaves_only_what_the_sweep_removes(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from grath_utils.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as p:\n"
        "    p.write_text('half'); print('ready', flush=True); time.sleep(60)\n"
    )
    target = tmp_path / "run.json"
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    writer.kill()
    writer.wait()
    assert not target.exists()
    assert sweep_partials(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_sweep_leaves_other_hidden_folders_alone(tmp_path: Path) -> None:
    other = tmp_path / ".ipynb_checkpoints.old"
    other.mkdir()
    (other / "mine.txt").write_text("keep")
    assert sweep_partials(tmp_path) == 0
    assert (other / "mine.txt").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "x.jsonl, line 2: not valid JSON"),
        (b'{"a": 1}\n[1]\n', "x.jsonl, line 2: expected a JSON object"),
        (b'{"a": 1}\n"text"\n', "line 2: expected a JSON object .*found str"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "x.jsonl, line 2: not UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_jsonl(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        read_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_json(tmp_path)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert read_jsonl(tmp_path / "x.jsonl") == [{"a": 1}, {"a": 2}]


def test_fingerprints_depend_on_content_only(tmp_path: Path) -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    (tmp_path / "one").write_text("1")
    first = fingerprint_folder(tmp_path)
    os.utime(tmp_path / "one", (time.time() + 5,) * 2)
    assert fingerprint_folder(tmp_path) == first
    (tmp_path / "one").write_text("2")
    assert fingerprint_folder(tmp_path) != first


# --- the journal ---------------------------------------------------------------------------------


def test_a_journal_gives_back_what_was_finished(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "r.json"
    journal = Journal.beside(out, "one")
    assert journal.read() == {}
    journal.append(0, [1.0])
    journal.append(3, [{"a": "\u2028"}])
    with open(journal.path, "a", encoding="utf-8") as handle:
        handle.write('{"part": 5, "ro')  # killed in the middle of a line
    assert Journal.beside(out, "one").read() == {0: [1.0], 3: [{"a": "\u2028"}]}
    journal.append(4, [])
    assert Journal.beside(out, "one").read().keys() == {0, 3, 4}
    journal.remove()
    assert list(out.parent.iterdir()) == []


OTHER = ['{"identity": "two"}\n', '{"identity": 3}\n', "no json\n", "[]\n", '{"ident']
OTHER += ['{"identity": "one"}\n{"batch": 0, "values": []}\n']


@pytest.mark.parametrize("text", OTHER)
def test_a_journal_of_other_work_is_set_aside(tmp_path: Path, text: str) -> None:
    journal = Journal.beside(tmp_path / "r.json", "one")
    journal.path.write_text(text)
    with pytest.warns(UserWarning, match=r"r\.json\.journal\.old"):
        assert journal.read() == {}
    assert (tmp_path / "r.json.journal.old").read_text() == text
    journal.append(0, [1])
    assert journal.read() == {0: [1]}


def test_no_journal_is_kept_without_an_output() -> None:
    journal = Journal.beside(None, "one")
    journal.append(0, [1])
    assert journal.read() == {}
    journal.remove()


def test_a_journal_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="run the same command again"):
        Journal.beside(tmp_path / "file" / "r.json", "one").append(0, [])
