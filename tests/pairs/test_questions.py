"""Source questions: every kind of source, every kind of bad row, splits and overlap."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError

from grath_utils.config import QuestionsConfig
from grath_utils.errors import DataError, FetchError, UsageError
from grath_utils.evaluation import reference_questions
from grath_utils.evaluation.benchmarks.hub_files import HubFile
from grath_utils.files import fingerprint
from grath_utils.pairs.overlap import overlap_with_benchmarks
from grath_utils.pairs.questions import Question, load_questions, split_held_out


def write(path: Path, *lines: str | dict) -> Path:
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    path.write_text(text, encoding="utf-8")
    return path


def load(path: Path, **options):
    return load_questions(QuestionsConfig(source=str(path), **options), seed=0)


# --- sources -------------------------------------------------------------------------------------


def test_own_questions_are_whole():
    found = load_questions(QuestionsConfig(), seed=0)
    assert len(found) >= 240
    assert found.skipped == {}
    assert all(q.gold is None and not q.candidates for q in found.questions)
    assert "own questions" in found.source


def test_jsonl_file(tmp_path):
    path = write(
        tmp_path / "q.jsonl",
        {"question": "Why  is\nit so?", "id": 7, "topic": "logic"},
        "",
        {"question": "Who?", "candidates": ["I", "you"], "gold": 1},
    )
    one, two = load(path).questions
    assert (one.id, one.text, one.topic) == ("7", "Why is it so?", "logic")
    assert one.where.endswith("q.jsonl, line 1")
    assert (two.candidates, two.gold) == (("I", "you"), 1)
    assert two.where.endswith("line 3")  # blank lines count


def test_a_part_of_our_own_questions():
    science, everyday, both = (
        load_questions(QuestionsConfig(source=name), seed=0)
        for name in ("own_science", "own_everyday", "own")
    )
    assert science.questions + everyday.questions == both.questions
    assert "part science" in science.source
    assert min(len(science), len(everyday)) >= 400


def test_csv_file_with_a_column_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "q.csv"
    path.write_bytes('\ufeffnr,Frage\r\n1,"Warum, und\nwozu?"\r\n2,Weshalb ß?\r\n'.encode())
    found = load(path, column="Frage")
    assert [q.text for q in found.questions] == ["Warum, und wozu?", "Weshalb ß?"]
    assert len({q.id for q in found.questions}) == 2


@pytest.fixture
def small_mirror(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "mirror"
    arc = folder / "ai2_arc" / "ARC-Challenge"
    arc.mkdir(parents=True)
    rows = [
        {
            "id": f"arc-{i}",
            "question": f"Question number {i}?",
            "choices": {"text": ["w", "x", "y", "z"], "label": ["1", "2", "3", "4"]},
            "answerKey": "3",
        }
        for i in range(5)
    ]
    write(arc / "train.jsonl", *rows, rows[0])
    monkeypatch.setenv("GRATH_MIRROR", str(folder))
    return folder


def test_arc_from_the_mirror(small_mirror):
    found = load_questions(QuestionsConfig(source="arc_challenge"), seed=0)
    assert len(found) == 5
    assert found.skipped == {"duplicated": 1}  # other people's data set: counted, not refused
    assert found.questions[2].candidates == ("w", "x", "y", "z")
    assert found.questions[2].gold == 2
    assert str(small_mirror) in found.source


def test_a_damaged_row_of_arc_is_not_dropped_without_a_word(small_mirror):
    path = small_mirror / "ai2_arc" / "ARC-Challenge" / "train.jsonl"
    path.write_text(path.read_text() + '{"id": "arc-9", "question": "Cut off he\n')
    with pytest.raises(DataError, match=r"train.jsonl, line 7: not valid JSON.*skip_bad=true"):
        load_questions(QuestionsConfig(source="arc_challenge"), seed=0)
    with pytest.warns(UserWarning, match="left out 1 duplicated, 1 malformed"):
        found = load_questions(QuestionsConfig(source="arc_challenge", skip_bad=True), seed=0)
    assert len(found) == 5


def test_a_mirror_without_the_file_says_so(small_mirror):
    with pytest.raises(DataError, match=r"no .*ARC-Easy.*unset GRATH_MIRROR"):
        load_questions(QuestionsConfig(source="arc_easy"), seed=0)


@pytest.mark.slow
def test_hub_without_network_says_what_to_do(monkeypatch):
    monkeypatch.delenv("GRATH_MIRROR", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FetchError, match="GRATH_MIRROR.*questions.source=own"):
        load_questions(QuestionsConfig(source="arc_challenge"), seed=0)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (ConnectionError("Couldn't reach the Hub"), FetchError, "fetched .*reach the Hub"),
        (OSError("the cable was pulled"), FetchError, "cable was pulled"),
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist"), DataError, "read: .*doesn't exist"),
        (ValueError('Unknown split "dev"'), DataError, '"a/b", split "dev", .*Unknown split'),
        (None, DataError, '"a/b", split "dev", has no rows'),
    ],
)
def test_the_hub_is_out_of_reach_or_has_no_such_rows(monkeypatch, fault, error, message):
    def faulty(*_, **__):
        if fault:
            raise fault
        return []

    monkeypatch.setattr(datasets, "load_dataset", faulty)
    # Questions and benchmarks say the same.
    for read in (
        lambda: load_questions(QuestionsConfig(source="a/b", split="dev"), seed=0),
        HubFile("a/b", "0" * 40, None, "dev").from_hub,
    ):
        with pytest.raises(error, match=message):
            read()


def test_hub_data_set_with_configuration_and_column(monkeypatch):
    asked = []

    def fake(name, configuration, *, split, revision):
        assert revision is None
        asked.append((name, configuration, split))
        return [{"prompt": "Why?"}, {"prompt": "How?"}]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    config = QuestionsConfig(source="some/thing:small", column="prompt", split="test")
    found = load_questions(config, seed=0)
    assert asked == [("some/thing", "small", "test")]
    assert [q.text for q in found.questions] == ["Why?", "How?"]
    assert found.questions[1].where == "some/thing, row 1"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("arc_chalenge", 'did you mean "arc_challenge"'),
        ("nowhere.jsonl", "no such file"),
        ("word", "valid ones are"),
        (str(Path(__file__).parent), "is a folder"),
    ],
)
def test_unknown_source(source, message):
    with pytest.raises(DataError, match=message):
        load_questions(QuestionsConfig(source=source), seed=0)


# --- bad rows ------------------------------------------------------------------------------------

ARC_ROW = {"question": "What is ice?", "answerKey": "A"}
BAD_ROWS = {
    "half a row": ('{"question": ', "malformed", "not valid JSON"),
    "a list": ("[1, 2]", "malformed", "expected a JSON object, found list"),
    "a text": ('"x"', "malformed", "expected a JSON object, found str"),
    "a key twice": (
        '{"question": "a?", "question": "b?"}',
        "malformed",
        '"question" is given twice',
    ),
    "not a number": ('{"question": "a?", "x": NaN}', "malformed", "not valid JSON"),
    "a huge number": ('{"question": %s}' % ("7" * 5000), "malformed", "not valid JSON .*digits"),
    "brackets": ("[" * 100_000, "malformed", "not valid JSON .*brackets"),
    "brackets in a row": ('{"question": "a?", "x": %s1}' % ("[" * 10_000), "malformed", "brackets"),
    "a lone surrogate": (r'{"question": "\ud83d?"}', "malformed", "surrogate"),
    "a lone surrogate elsewhere": (r'{"question": "a?", "topic": "\ud83d"}', "malformed", "surrog"),
    "NUL": ({"question": "a\0b?"}, "not_utf8", "a NUL character"),
    "no question": ({"text": "x"}, "missing_column", 'no column "question"'),
    "a number": ({"question": 3}, "not_text", "holds int"),
    "a list of texts": ({"question": ["a?"]}, "not_text", "holds list"),
    "null": ({"question": None}, "not_text", "holds NoneType"),
    "spaces": ({"question": " \n "}, "empty", "is empty"),
    "zero width": ({"question": "\u200b\ufeff \u2060"}, "empty", "is empty"),
    "a lone accent": ({"question": "\u0301"}, "empty", "is empty"),
    "the same question": ({"question": "WHY  is it so?"}, "duplicated", "the same .*line 1"),
    "the same in NFD": ({"question": "Cafe\u0301?"}, "duplicated", "the same .*line 2"),
    "the same id": (
        {"question": "Else?", "id": "first"},
        "duplicated_id",
        'id "first" is .*line 1',
    ),
    "the same long id": ({"question": "Else?", "id": "/" * 10_000}, "duplicated_id", "line 2"),
    "no choices": (
        ARC_ROW | {"choices": {"text": None, "label": None}},
        *("bad_candidates", '"choices.text" is no list of texts'),
    ),
    "a choice that is null": (
        ARC_ROW | {"choices": {"text": ["a", None], "label": ["A", "B"]}},
        *("bad_candidates", '"choices.text" is no list of texts'),
    ),
    "more choices than labels": (
        ARC_ROW | {"choices": {"text": ["a", "b"], "label": ["A"]}},
        *("bad_candidates", '"choices.label" does not name the 2 choices'),
    ),
    "labels that are no list": (
        ARC_ROW | {"choices": {"text": ["a"], "label": 1}},
        *("bad_candidates", '"choices.label" does not name'),
    ),
    "no such label": (
        ARC_ROW | {"choices": {"text": ["a", "b"], "label": ["B", "C"]}},
        *("bad_candidates", "\"answerKey\" is 'A', not one of B, C"),
    ),
    "a label twice": (
        ARC_ROW | {"choices": {"text": ["a", "b"], "label": ["A", "A"]}},
        *("bad_candidates", "\"answerKey\" is 'A', not one of A, A"),
    ),
    "no such candidate": (
        {"question": "a?", "candidates": ["x", "y"], "gold": 2},
        *("bad_candidates", '"gold" is 2, not one of 0, 1'),
    ),
    "candidates of no text": (
        {"question": "a?", "candidates": [["x"], ["y"]]},
        *("bad_candidates", '"candidates" is no list of texts'),
    ),
    "an object of candidates": ({"question": "a?", "candidates": {}}, "bad_candidates", "no list"),
}


@pytest.mark.parametrize(("row", "reason", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_or_counted(tmp_path, row, reason, message):
    good = {"question": "Why is it so?", "id": "first"}, {"question": "Café?", "id": "/" * 10_000}
    path = write(tmp_path / "q.jsonl", *good, row, {"question": "And now?"})
    with pytest.raises(DataError, match=f"q.jsonl, line 3: .*{message}") as raised:
        load(path)
    assert len(str(raised.value)) < 600
    with pytest.warns(UserWarning, match=f"left out 1 {reason}\n.*q.jsonl, line 3: .*{message}"):
        found = load(path, skip_bad=True)
    assert found.skipped == {reason: 1}
    assert [q.text for q in found.questions] == ["Why is it so?", "Café?", "And now?"]
    write(path, row, row)
    if reason not in ("duplicated", "duplicated_id"):
        with pytest.raises(
            DataError, match=f"no question in it \\(2 {reason} left out; the first: .*line 1: "
        ):
            load(path, skip_bad=True)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "What is C#?"},
        {"question": "Is it", "id": 7},
        {"question": "???"},
        {"question": "🔥"},
        {"question": "a?", "choices": None, "candidates": None, "gold": None, "id": None},
        {"question": "a?", "choices": ["x", "y"], "answer": 1},  # of another data set's form
        {"question": "a?", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": ""},
        {"question": "a?", "choices": {"text": [1, 2], "label": [1, 2]}, "answerKey": 2},
        {"question": "a?", "id": "a/b"},
        {"question": "long " * 100_000, "topic": 3},
    ],
)
def test_rows_that_are_not_bad(tmp_path, row):
    path = write(tmp_path / "q.jsonl", {"question": "What is C++?"}, {"question": "Is it?"}, row)
    assert load(path).questions[2].text == row["question"].strip()


@pytest.mark.parametrize(
    ("name", "first", "line"),
    [("q.jsonl", b'{"question": "a?"}\n', 2), ("q.csv", b"question\na?\n", 3)],
)
def test_one_line_that_is_not_utf8(tmp_path, name, first, line):
    path = tmp_path / name
    path.write_bytes(first + b'{"question": "\xff\xfe?"}\n')
    with pytest.raises(DataError, match=f"line {line}: not UTF-8"):
        load(path)
    with pytest.warns(UserWarning, match="not UTF-8"):
        found = load(path, skip_bad=True)
    assert found.skipped == {"not_utf8": 1}
    assert len(found) == 1


TABLES = {
    "windows": ("nr,question\r\n1,a?\r\n2,b?\r\n", ["a?", "b?"]),
    "old mac": ("nr,question\r1,a?\r2,b?", ["a?", "b?"]),
    "german": ("nr;question\n1;Warum, und wie?\n", ["Warum, und wie?"]),
    "tabs": ("nr\tquestion\n1\ta, b; c?\n", ["a, b; c?"]),
    "blank lines": ("\nquestion\n\na?\n\n", ["a?"]),
    "columns without a name": ("question,,\na?,,\n", ["a?"]),
    "spaces around names": ("nr, question\n1,a?\n", ["a?"]),
}


@pytest.mark.parametrize(("text", "expected"), TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("name", ["q.csv", "q.tsv"])
def test_tables_as_programs_write_them(tmp_path, name, text, expected):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    assert [q.text for q in load(path).questions] == expected


BAD_TABLES = {  # text, the line that is bad, why, the questions of the other lines
    "too many fields": ("question,x\na?,1,2\nb?,1\n", 2, "3 fields in 2 columns", ["b?"]),
    "too few fields": ("question,x\na?\nb?,1\n", 2, "1 fields in 2 columns", ["b?"]),
    "an open quotation mark": ('question\na?\n"b?\nc?\nd?\n', 3, "end of data", ["a?", "c?", "d?"]),
    "a mark inside": ('question\n"a" b?\nc?\n', 2, "expected after", ["c?"]),
    "an open mark, then another": ('question\n"a?\nb?\nc "d" e?\n', 2, "", ["b?", 'c "d" e?']),
    "NUL": ("question\na\0?\nb?\n", 2, "NUL", ["b?"]),
    "an empty question": ('nr,question\n1," "\n2,b?\n', 2, "is empty", ["b?"]),
    "a field of a megabyte": (f"question\n{'a' * 2**20}\nb?\n", 2, "not valid CSV", ["b?"]),
}


@pytest.mark.parametrize(("text", "line", "message", "others"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_bad_row_of_a_table(tmp_path, text, line, message, others):
    path = tmp_path / "q.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=f"q.csv, line {line}: .*{message}"):
        load(path)
    with pytest.warns(UserWarning, match=f"q.csv, line {line}: .*{message}"):
        found = load(path, skip_bad=True)
    assert [q.text for q in found.questions] == others
    assert sum(found.skipped.values()) == 1


BAD_FILES = {
    "empty": ("q.jsonl", b"", "no question in it .nothing left out"),
    "blank": ("q.jsonl", b"\n \n", "no question in it"),
    "empty table": ("q.csv", b"", "no question in it"),
    "a header alone": ("q.csv", b"question\n", "no question in it"),
    "a column twice": (
        "q.csv",
        b"question,x,question\na?,1,b?\n",
        'line 1: 2 columns .*"question"',
    ),
    "a column twice but for spaces": ("q.csv", b"question, question\na?,b?\n", "2 columns"),
    "a column twice, NFC and NFD": ("q.csv", "\u00e9,e\u0301\na?,b?\n".encode(), "2 columns"),
    "no header": ("q.csv", b"What is ice?\nWhat is snow?\n", 'no column "question"'),
    "another column": ("q.csv", b"questions,x\na?,1\n", 'did you mean "questions"'),
    "UTF-16": ("q.csv", "question\na?\n".encode("utf-16"), "UTF-16 text; save the file as UTF-8"),
    "UTF-16, JSON": ("q.jsonl", '{"question": "a?"}'.encode("utf-16"), "UTF-16"),
    "UTF-16 without a mark": ("q.csv", "question\na?\n".encode("utf-16-le"), "no column"),
    "an array": ("q.json", b'[{"question": "a?"}, {"question": "b?"}]', "a JSON array; write each"),
    "an array on lines": (
        "q.jsonl",
        b'[\n{"question": "a?"},\n{"question": "b?"}\n]',
        "JSON array",
    ),
    "one object on lines": ("q.json", b'{\n"question": "a?"\n}', "line 1: not valid JSON"),
    "a header of no text": ("q.csv", b'"\x80\nx",y\na?,1\n', r"valid ones are: y, \\udc80 x"),
    "a picture": ("q.jsonl", bytes(range(256)), "line 1: "),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_file_that_holds_no_questions(tmp_path, name, content, message, skip_bad):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(path, skip_bad=skip_bad)


# --- limit, split, round trip ---------------------------------------------------------------------


def numbered(tmp_path, count=40) -> Path:
    return write(tmp_path / "n.jsonl", *({"question": f"Number {i}?"} for i in range(count)))


def test_limit_is_drawn_by_the_seed_in_the_order_of_the_source(tmp_path):
    path = numbered(tmp_path)
    config = QuestionsConfig(source=str(path), limit=10)
    one, again, other = (load_questions(config, seed) for seed in (1, 1, 2))
    assert one == again
    assert one.fingerprint != other.fingerprint
    numbers = [int(q.text.split()[1][:-1]) for q in one.questions]
    assert len(numbers) == 10
    assert numbers == sorted(numbers)
    assert numbers != list(range(10))
    assert set(one.questions) < set(load(path).questions)  # ids do not depend on the limit


def test_split_is_by_question_and_by_seed(tmp_path):
    questions = load(numbered(tmp_path)).questions
    train, held = split_held_out(questions, 0.25, 0)
    assert (len(train), len(held)) == (30, 10)
    assert sorted(q.id for q in (*train, *held)) == sorted(q.id for q in questions)
    assert split_held_out(questions, 0.25, 0) == (train, held)
    assert split_held_out(questions, 0.25, 1)[1] != held


def test_one_question_comes_to_one_side(tmp_path):
    """Two pairs of a file may belong to one question, written in two forms of Unicode."""
    texts = [f"Caf\u00e9 {i}?" for i in range(20)]
    twice = [Question(f"{form} {t}", normalize(form, t)) for t in texts for form in ("NFC", "NFD")]
    once = [Question(t, t) for t in texts]
    for seed in range(20):
        sides = [{normalize("NFC", q.text) for q in s} for s in split_held_out(twice, 0.3, seed)]
        assert sides == [{q.text for q in side} for side in split_held_out(once, 0.3, seed)]
    with pytest.raises(DataError, match="1 question"):
        split_held_out(twice[:2], 0.5, 0)


def test_texts_are_in_one_form(tmp_path):
    """Or the same question would have two prompts, two places in a journal and two names."""
    row = {
        "id": "e\u0301",
        "question": "Cafe\u0301?",
        "topic": "e\u0301",
        "candidates": ["e\u0301"],
    }
    (one,) = load(write(tmp_path / "nfd.jsonl", row)).questions
    assert one.to_row() == {
        "id": "\u00e9",
        "question": "Caf\u00e9?",
        "topic": "\u00e9",
        "candidates": ["\u00e9"],
    }
    path = write(tmp_path / "column.csv", "Frage\u0301", "a?")
    assert len(load(path, column="Frag\u00e9")) == 1


def test_the_splits_of_our_own_data_stay():
    """Runs are compared across versions: the same questions in the same order, the same split."""
    found = load_questions(QuestionsConfig(), seed=0)
    assert found.fingerprint == "fcfbf9c23e6aed07"
    school = replace(found, questions=found.questions[:400])  # all there were until others came
    assert school.fingerprint == "10350b22314e62a6"
    train, held = split_held_out(school.questions, 0.2, 0)
    assert fingerprint([[q.id for q in side] for side in (train, held)]) == "962a39f41de1187e"


def test_split_leaves_at_least_one_on_each_side(tmp_path):
    questions = load(numbered(tmp_path, 2)).questions
    for share in (0.01, 0.99):
        assert [len(part) for part in split_held_out(questions, share, 0)] == [1, 1]
    with pytest.raises(DataError, match="cannot be split"):
        split_held_out(questions[:1], 0.5, 0)
    with pytest.raises(UsageError, match="between 0 and 1"):
        split_held_out(questions, 0.0, 0)


def test_round_trip():
    for question in (Question("a", "Why?", ("x", "y"), 1, "logic"), Question("b", "How?")):
        assert Question.from_row(json.loads(json.dumps(question.to_row()))) == question
    with pytest.raises(DataError, match="row 1: needs text"):
        Question.from_row({"id": "a"}, where="row 1")
    with pytest.raises(DataError, match='row 2: "gold" is 5'):
        Question.from_row(
            {"id": "a", "question": "?", "candidates": ["x"], "gold": 5}, where="row 2"
        )


# --- overlap -------------------------------------------------------------------------------------

BENCHMARK = {"bench": ["What happens to the water in a pot when the stove has been on for long?"]}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("what happens to the water in a pot when the stove has been on for long", "same"),
        ("So what happens to the water in a pot when the stove has been on?", "near"),
        ("What happens to the water in the sea when the wind blows over it?", None),
    ],
)
def test_overlap_kinds(text, kind):
    found = overlap_with_benchmarks([Question("q", text)], BENCHMARK)
    assert [o.kind for o in found] == ([kind] if kind else [])
    assert all(o.benchmark == "bench" for o in found)


@pytest.mark.parametrize(
    ("ours", "theirs", "found"),
    [
        ("What is C++?", "What is C#?", 0),
        ("Was it 🔥?", "Was it 🧊?", 0),
        ("what is CAFE\u0301", "What is caf\u00e9?", 1),
    ],
)
def test_overlap_of_short_questions(ours, theirs, found):
    assert len(overlap_with_benchmarks([Question("q", ours)], {"bench": [theirs]})) == found


def test_stock_phrases_are_no_overlap():
    frame = "Which of the following statements best explains why {}?"
    found = overlap_with_benchmarks(
        [Question("q", frame.format("magnets stick to a door made of iron and paint"))],
        {"bench": [frame.format("two animals of different kinds have no offspring at all")]},
    )
    assert found == []


def test_overlap_is_sought_in_every_benchmark_at_hand(tmp_path, monkeypatch):
    monkeypatch.delenv("GRATH_MIRROR", raising=False)
    assert list(reference_questions()) == ["probe", "retention"]
    folder = tmp_path / "ai2_arc" / "ARC-Challenge"
    folder.mkdir(parents=True)
    row = {"id": "1", "question": "Why?", "answerKey": "A"}
    row["choices"] = {"text": ["x", "y"], "label": ["A", "B"]}
    for split in ("train", "test"):
        write(folder / f"{split}.jsonl", row)
    monkeypatch.setenv("GRATH_MIRROR", str(tmp_path))  # the other benchmarks are not in it
    found = reference_questions()
    assert list(found) == ["arc_challenge", "probe", "retention"]
    assert found["arc_challenge"] == ["Why?"]
    write(folder / "test.jsonl", {"id": "1"})
    with pytest.raises(DataError, match="row 1"):
        reference_questions()


def test_own_questions_do_not_overlap_with_what_they_are_tested_on():
    references = reference_questions()
    assert references["probe"]
    own = load_questions(QuestionsConfig(), seed=0).questions
    assert overlap_with_benchmarks(own, references) == []
