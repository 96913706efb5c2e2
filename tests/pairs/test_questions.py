"""Source questions: every kind of source, every kind of bad row, splits and overlap."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grath_utils.config import QuestionsConfig
from grath_utils.errors import DataError, UsageError
from grath_utils.pairs.overlap import overlap_with_benchmarks, reference_questions
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


def test_a_mirror_without_the_file_says_so(small_mirror):
    with pytest.raises(DataError, match=r"no .*ARC-Easy.*unset GRATH_MIRROR"):
        load_questions(QuestionsConfig(source="arc_easy"), seed=0)


def test_hub_without_network_says_what_to_do(monkeypatch):
    monkeypatch.delenv("GRATH_MIRROR", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="GRATH_MIRROR"):
        load_questions(QuestionsConfig(source="arc_challenge"), seed=0)


def test_hub_data_set_with_configuration_and_column(monkeypatch):
    import datasets

    asked = []

    def fake(name, configuration, *, split):
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

BAD_ROWS = [
    ('{"question": ', "malformed", "not valid JSON"),
    ("[1, 2]", "malformed", "expected a JSON object"),
    ({"text": "x"}, "missing_column", 'no column "question"'),
    ({"question": 3}, "not_text", "holds int"),
    ({"question": None}, "not_text", "holds NoneType"),
    ({"question": " \n "}, "empty", "is empty"),
    ({"question": "WHY is it so"}, "duplicated", "the same question as .*line 1"),
    ({"question": "Else?", "id": "first"}, "duplicated_id", 'id "first" is that of .*line 1'),
]


@pytest.mark.parametrize(("row", "reason", "message"), BAD_ROWS)
def test_a_bad_row_is_named_or_counted(tmp_path, row, reason, message):
    good = {"question": "Why is it so?", "id": "first"}
    path = write(tmp_path / "q.jsonl", good, row, {"question": "And now?"})
    with pytest.raises(DataError, match=f"q.jsonl, line 2: .*{message}"):
        load(path)
    found = load(path, skip_bad=True)
    assert found.skipped == {reason: 1}
    assert [q.text for q in found.questions] == ["Why is it so?", "And now?"]


def test_one_line_that_is_not_utf8(tmp_path):
    for name, first in (("q.jsonl", b'{"question": "a?"}\n'), ("q.csv", b"question\na?\n")):
        path = tmp_path / name
        path.write_bytes(first + b'{"question": "\xff\xfe?"}\n')
        line = first.count(b"\n") + 1
        with pytest.raises(DataError, match=f"line {line}: not UTF-8"):
            load(path)
        found = load(path, skip_bad=True)
        assert found.skipped == {"not_utf8": 1}
        assert len(found) == 1


def test_malformed_csv(tmp_path):
    path = write(tmp_path / "q.csv", "question,x", "a?,1,2", "b?,1")
    with pytest.raises(DataError, match="line 2: not valid CSV"):
        load(path)
    assert load(path, skip_bad=True).skipped == {"malformed": 1}
    write(path, "questions,x", "a?,1")
    with pytest.raises(DataError, match='did you mean "questions"'):
        load(path)


@pytest.mark.parametrize("content", ["", "\n\n", '{"question": ""}\n'])
def test_empty_file(tmp_path, content):
    path = tmp_path / "q.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="no question in it"):
        load(path, skip_bad=True)


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


def test_stock_phrases_are_no_overlap():
    frame = "Which of the following statements best explains why {}?"
    found = overlap_with_benchmarks(
        [Question("q", frame.format("magnets stick to a door made of iron and paint"))],
        {"bench": [frame.format("two animals of different kinds have no offspring at all")]},
    )
    assert found == []


def test_own_questions_do_not_overlap_with_what_they_are_tested_on():
    references = reference_questions()
    assert references["probe"]
    own = load_questions(QuestionsConfig(), seed=0).questions
    assert overlap_with_benchmarks(own, references) == []
