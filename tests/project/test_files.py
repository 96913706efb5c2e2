"""Files appear whole or not at all; reading names file and line."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grath_utils.errors import DataError, RunError, UsageError
from grath_utils.files import (
    Journal,
    atomic_path,
    check_output,
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


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM, errno.ENAMETOOLONG])
def test_an_error_that_names_the_target_is_one_of_writing(tmp_path: Path, code: int) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("x", "x/adapter.safetensors", ".", "link/x", ".x.1.grath-partial/x"):
        raised = OSError(code, os.strerror(code), str(tmp_path / name))
        told = pytest.raises(RunError, match=f"cannot write .*x: {os.strerror(code)}")
        with told, explained_write_errors(tmp_path / "x"):
            raise raised


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere/model.safetensors"),
        FileNotFoundError(errno.ENOENT, "No such file", "x.csv"),
        PermissionError(errno.EACCES, "Permission denied", "/elsewhere/secret"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        ConnectionError("the Hub is not reached"),
        OSError(3, "of other libraries", 7),
        ChildProcessError("pip"),
    ],
)
def test_another_error_of_the_work_is_none_of_writing(tmp_path: Path, error: OSError) -> None:
    with pytest.raises(type(error)) as caught, atomic_path(tmp_path / "x.txt"):
        raise error
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_quota_is_a_full_disk(tmp_path: Path) -> None:
    spent = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    with pytest.raises(RunError, match="No space left"), atomic_path(tmp_path / "x.txt"):
        raise spent


def make_folder(path: Path, text: str = "new") -> None:
    path.mkdir()
    (path / "file").write_text(text)


def test_a_folder_appears_whole_and_takes_the_place_of_an_empty_one_only(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    with atomic_path(target) as partial:
        make_folder(partial)
    assert [p.name for p in target.iterdir()] == ["file"]
    for make in (make_folder, Path.touch):
        refused = pytest.raises(UsageError, match="adapter is a folder that is not empty")
        with refused, atomic_path(target) as partial:
            make(partial)
    assert (target / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


CALLS = ("os.fsync", "os.replace", "tempfile.mkdtemp", "shutil.rmtree", "pathlib.Path.rmdir")
"""What writing whole files does to the disk."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is POSIX")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("call", CALLS)
def test_a_kill_at_any_moment_and_a_sweep_leave_one_whole_copy(
    tmp_path: Path, monkeypatch, call: str, kind: str, late: bool
) -> None:
    """The process dies just before or after each call that changes something on the disk."""
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("old")
    else:
        target.mkdir()
    if not (child := os.fork()):
        owner, _, name = call.rpartition(".")
        owner = Path if owner == "pathlib.Path" else __import__(owner)
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (late and real(*a, **k), os._exit(9)))
        try:
            with atomic_path(target) as partial:
                if kind == "file":
                    partial.write_text("new")
                else:
                    make_folder(partial)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    sweep_partials(tmp_path)
    if kind == "file":
        assert target.read_text() in ("old", "new")
    elif target.exists():  # an empty folder is no loss
        assert [p.read_text() for p in target.iterdir()] in ([], ["new"])
    assert {p.name for p in tmp_path.iterdir()} <= {"target"}


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
    assert list(tmp_path.iterdir()) != []
    sweep_partials(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".ipynb_checkpoints.old", ".cache.x/cache", ".x.y/replaced"])
def test_the_sweep_leaves_other_hidden_folders_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    sweep_partials(tmp_path)
    assert (tmp_path / name).is_dir()


def test_a_link_stays_and_what_it_names_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name, text in (("there/old.txt", "old"), ("there/new.txt", None)):
        if text:
            (tmp_path / name).write_text(text)
        link = tmp_path / f"link-{text}"
        link.symlink_to(name)
        write_text(link, "written")
        assert link.is_symlink()
        assert (tmp_path / name).read_text() == "written"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link-None", "link-old", "there"]


def test_names_of_any_length_that_the_disk_takes(tmp_path: Path) -> None:
    write_text(tmp_path / ("é" * 127), "x")
    assert (tmp_path / ("é" * 127)).read_text() == "x"
    with pytest.raises(RunError, match="cannot write .*too long"):
        write_text(tmp_path / ("x" * 256), "x")


def test_a_write_protected_folder_is_told_before_the_work(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for name in ("x.json", "deep/x.json"):
        with pytest.raises(UsageError, match=f"cannot write .*x.json: {tmp_path} is write-protec"):
            check_output(tmp_path / name, read_json, ())


PAIR = '{"id": "1", "question": "Q"}\n'


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "is a folder, and stays; name a file"),
        ("full", "is a folder, and stays; name a file"),
        ("", "is a folder, and stays; name a file"),
        ("link-to-full", "is a folder, and stays; name a file"),
        ("notes.txt", "was not written by this command"),
        ("other.jsonl", "was not written by this command"),
        ("picture.jsonl", "was not written by this command"),
        ("input.jsonl", "is read by this command"),
        ("full/../input.jsonl", "is read by this command"),
        ("link-to-input", "is read by this command"),
        ("hard-link-to-input", "is read by this command"),
        ("input.jsonl/x", "input.jsonl is a file, not a folder"),
        ("locked.jsonl", "is write-protected"),
        ("pipe", "is no ordinary file"),
        ("ours.jsonl", None),
        ("nothing.jsonl", None),
        ("link-to-ours", None),
        ("new/deep/x.jsonl", None),
    ],
)
def test_what_an_output_may_replace(tmp_path: Path, monkeypatch, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    make_folder(tmp_path / "full")
    for file, text in {
        "notes.txt": "my thesis",
        "other.jsonl": '{"id": "1"}\n',
        "input.jsonl": PAIR,
        "ours.jsonl": PAIR * 2,
        "locked.jsonl": PAIR,
        "nothing.jsonl": "",
    }.items():
        (tmp_path / file).write_text(text)
    (tmp_path / "picture.jsonl").write_bytes(b"\x89PNG\x00\xff")
    (tmp_path / "locked.jsonl").chmod(0o444)
    for link, there in (("full", "full"), ("input", "input.jsonl"), ("ours", "ours.jsonl")):
        (tmp_path / f"link-to-{link}").symlink_to(tmp_path / there)
    os.link(tmp_path / "input.jsonl", tmp_path / "hard-link-to-input")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    for out in (Path(name), tmp_path / name):
        checked = {"read": read_jsonl, "keys": ("id", "question"), "inputs": [Path("input.jsonl")]}
        if message is None:
            check_output(out, **checked)
            continue
        with pytest.raises(UsageError, match=message):
            check_output(out, **checked)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "x.jsonl, line 2: not valid JSON"),
        (b'{"a": 1}\n[1]\n', "x.jsonl, line 2: expected a JSON object"),
        (b'{"a": 1}\n"text"\n', "line 2: expected a JSON object .*found str"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "x.jsonl, line 2: not UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}\n\xff', "x.jsonl, line 2: not UTF-8"),  # after a byte-order mark
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
    journal, sizes = Journal.beside(out, "one"), [1, 0, 0, 1, 0]
    assert journal.read(sizes, Any) == {}
    journal.append(0, [1.0])
    journal.append(3, [{"a": "\u2028"}])
    with open(journal.path, "a", encoding="utf-8") as handle:
        handle.write('{"part": 5, "ro')  # killed in the middle of a line
    assert Journal.beside(out, "one").read(sizes, Any) == {0: [1.0], 3: [{"a": "\u2028"}]}
    journal.append(4, [])
    assert Journal.beside(out, "one").read(sizes, Any).keys() == {0, 3, 4}
    journal.remove()
    assert list(out.parent.iterdir()) == []


OTHER = ['{"identity": "two"}\n', '{"identity": 3}\n', "no json\n", "[]\n", '{"idea', "[" * 9999]
OTHER += ['{"identity": "one"}\n{"batch": 0, "values": []}\n']


@pytest.mark.parametrize("text", OTHER)
def test_a_journal_of_other_work_is_set_aside(tmp_path: Path, text: str) -> None:
    journal = Journal.beside(tmp_path / "r.json", "one")
    for name in ("r.json.journal.old", "r.json.journal.old2", "r.json.journal.old3"):
        journal.path.write_text(text)
        with pytest.warns(UserWarning, match=rf"other inputs or settings; it is now {name},"):
            assert journal.read([1], int) == {}
        assert (tmp_path / name).read_text() == text
        journal.append(0, [1])
        assert journal.read([1], int) == {0: [1]}


@pytest.mark.parametrize("text", ["", "{", '{"ident', '{"identity": "one"}'])
def test_a_journal_that_was_torn_in_its_first_line_is_begun_again(tmp_path: Path, text) -> None:
    journal = Journal.beside(tmp_path / "r.json", "one")
    journal.path.write_text(text)
    with warnings.catch_warnings(action="error"):
        assert journal.read([1], int) == {}
    journal.append(0, [1])
    assert journal.read([1], int) == {0: [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json.journal"]


def test_two_kinds_of_work_on_one_output_are_not_mixed(tmp_path: Path) -> None:
    first, second = (Journal.beside(tmp_path / "r.json", identity) for identity in ("one", "two"))
    first.append(0, [1])
    with pytest.warns(UserWarning, match=r"is now r\.json\.journal\.old"):
        second.read([1, 1], int)
    second.append(0, [2])
    with pytest.raises(RunError, match="that of other work now: does another process"):
        first.append(1, [1])
    second.append(1, [2])
    assert second.read([1, 1], int) == {0: [2], 1: [2]}


@pytest.mark.parametrize(
    "line",
    [
        '{"part": 0, "rows": []}',
        '{"part": 0, "rows": [1.5]}',
        '{"part": 0, "rows": [1.5, "a"]}',
        '{"part": [0], "rows": [1.5, 2.5]}',
        '{"part": 7, "rows": [1.5, 2.5]}',
    ],
)
def test_a_part_of_another_form_is_made_again(tmp_path: Path, line: str) -> None:
    journal = Journal.beside(tmp_path / "r.json", "one")
    journal.append(1, [0.5])
    with open(journal.path, "a", encoding="utf-8") as handle:
        handle.write(line + "\n")
    assert journal.read([2, 1], float) == {1: [0.5]}
    journal.append(0, [1, 2.5])
    assert journal.read([2, 1], float) == {1: [0.5], 0: [1, 2.5]}


def test_no_journal_is_kept_without_an_output() -> None:
    journal = Journal.beside(None, "one")
    journal.append(0, [1])
    assert journal.read([1], int) == {}
    journal.remove()


def test_a_journal_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="run the same command again"):
        Journal.beside(tmp_path / "file" / "r.json", "one").append(0, [])


FORM = {
    "id": str,
    "n": int,
    "place": (Path, None),
    "metrics": {str: {"value": float, "ci95": ([float, float], None)}},
    "items": [{"id": str}],
}
GOOD = {
    "id": "", "n": 3, "place": "a/b", "metrics": {"mc1": {"value": 1, "ci95": [0, 1.5]}},
    "items": [{"id": "q1", "more": 1}, {"id": "q2"}], "more": [1],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"place": None, "metrics": {}, "items": []}, None),
        ({"id": None}, '"id" is None; expected text'),
        ({"n": True}, '"n" is True; expected a whole number'),
        ({"n": 1.0}, '"n" is 1.0; expected a whole number'),
        ({"n": 10**400}, '"n" is 1000'),
        ({"place": "a\0"}, '"place" is .*; expected a path'),
        ({"metrics": [1]}, r'"metrics" is \[1\]; expected an object'),
        ({"metrics": {"mc1": 0.5}}, '"metrics.mc1" is 0.5; expected an object'),
        ({"metrics": {"mc1": {"ci95": None}}}, '"metrics.mc1.value" is None; expected a number'),
        ({"metrics": {"mc1": {"value": 0, "ci95": [0]}}}, r'"metrics.mc1.ci95" is \[0\]; expected'),
        ({"items": [{"id": "q1"}, {}]}, r'"items\[1\].id" is None; expected text'),
    ],
)
def test_a_file_of_another_form_is_named_with_the_key(tmp_path: Path, change, message) -> None:
    path, value = tmp_path / "x.json", {**GOOD, **change}
    path.write_text(json.dumps(value), encoding="utf-8")
    if message is None:
        assert read_json(path, FORM) == value
        return
    with pytest.raises(DataError, match=rf"x\.json: {message}.* restore the file, or delete it"):
        read_json(path, FORM)
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(value), encoding="utf-8")
    with pytest.raises(DataError, match=rf"x\.json, line 2: {message}"):
        read_jsonl(path, FORM)
