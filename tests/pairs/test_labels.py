"""Labels: the same pairs, called otherwise, and sealed answers that nothing else opens."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from scripted import PAPER, QUESTIONS, Scripted, answering, completion, make, refine

import grath_utils
from grath_utils.errors import DataError, RunError
from grath_utils.files import read_jsonl, write_jsonl
from grath_utils.pairs import labels
from grath_utils.pairs.generate import Pair, read_pairs
from grath_utils.pairs.labels import SEALED, Sealed, as_written, read_sealed, relabelled

PAIRS = [
    Pair(f"q{i}", f"Why {i}?", f"So {i}.", f"No {i}.", i % 3, 0.25, 0.8, bool(i % 2))
    for i in range(400)
]


def turned(pairs, others=PAIRS) -> list[bool]:
    """Return which pairs are turned round, and check that nothing else has changed."""
    for pair, other in zip(pairs, others, strict=True):
        if pair != other:
            sides = {"correct": other.incorrect, "incorrect": other.correct}
            assert pair == replace(other, **sides, contrast=-0.25, truth=0.2)
    return [pair != other for pair, other in zip(pairs, others, strict=True)]


# --- the function --------------------------------------------------------------------------------


def test_own_labels_stay_and_inverted_ones_do_not():
    assert relabelled(PAIRS, "own", 0.0, 0) == PAIRS
    assert all(turned(relabelled(PAIRS, "inverted", 0.0, 0)))
    assert all(turned(relabelled(PAIRS, "own", 1.0, 0)))
    assert relabelled(PAIRS, "inverted", 1.0, 0) == PAIRS


def test_random_labels_are_a_fair_coin_for_each_question_and_seed():
    found = turned(relabelled(PAIRS, "random", 0.0, 0))
    assert 160 <= sum(found) <= 240  # 200, with a standard deviation of 10
    assert turned(relabelled(PAIRS[::-1], "random", 0.0, 0), PAIRS[::-1]) == found[::-1]
    later = [replace(pair, correct="New.", iteration=1) for pair in PAIRS]
    assert turned(relabelled(later, "random", 0.0, 0), later) == found
    other = turned(relabelled(PAIRS, "random", 0.0, 1))
    assert 160 <= sum(a != b for a, b in zip(found, other, strict=True)) <= 240


@pytest.mark.parametrize("kind", ["own", "random", "inverted", "mismatched"])
@pytest.mark.parametrize("pairs", [PAIRS, PAIRS[:7]], ids=["even", "odd"])
def test_what_was_written_comes_back(kind, pairs):
    once = relabelled(pairs, kind, 0.25, 3)
    assert once != pairs
    assert as_written(once, kind, 0.25, 3, {p.id: p.question for p in pairs}) == pairs


def test_a_mismatched_pair_keeps_its_answers_and_gets_another_question():
    for pairs in (PAIRS, PAIRS[:7]):
        found = relabelled(pairs, "mismatched", 0.0, 0)
        assert sorted(p.question for p in found) == sorted(p.question for p in pairs)
        for pair, other in zip(found, pairs, strict=True):
            assert pair.question != other.question
            assert replace(pair, question=other.question) == other


def test_a_share_is_flipped_on_top():
    flips = turned(relabelled(PAIRS, "own", 0.25, 0))
    assert 65 <= sum(flips) <= 135  # 100, with a standard deviation of 8.7
    more = turned(relabelled(PAIRS, "own", 0.5, 0))
    assert all(b for a, b in zip(flips, more, strict=True) if a)  # a larger share holds a smaller
    coins = turned(relabelled(PAIRS, "random", 0.0, 0))
    both = turned(relabelled(PAIRS, "random", 0.25, 0))
    assert both == [a != b for a, b in zip(coins, flips, strict=True)]
    agreeing = sum(a == b for a, b in zip(coins, flips, strict=True))
    assert 160 <= agreeing <= 240  # the two draws have nothing to do with each other


def test_annotated_pairs_hold_the_sealed_answers(monkeypatch):
    sealed = {f"q{i}": Sealed(f"why  {i}?", f"True {i}.", f"False {i}.") for i in range(3)}
    sealed["q2"] = sealed["q2"]._replace(question="Another one?")
    monkeypatch.setattr(labels, "read_sealed", lambda: sealed)
    pairs = relabelled(PAIRS, "annotated", 0.0, 0)
    assert pairs == [
        Pair("q0", "Why 0?", "True 0.", "False 0.", 0),
        Pair("q1", "Why 1?", "True 1.", "False 1.", 1),
    ]
    flipped = relabelled(PAIRS, "annotated", 1.0, 0)
    assert [p.correct for p in flipped] == ["False 0.", "False 1."]


# --- in a run ------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch) -> Scripted:
    script = Scripted()
    answering(monkeypatch, script)
    return script


@pytest.mark.parametrize("kind", ["random", "inverted"])
def test_later_rounds_keep_the_labels(tiny_policy, tmp_path, scripted, kind):
    config = replace(PAPER, labels=kind, flipped=0.25)
    make(tiny_policy, tmp_path / "own")
    report = make(tiny_policy, tmp_path, config)
    own, first = (read_pairs(f / "pairs.jsonl") for f in (tmp_path / "own", tmp_path))
    assert [p.id for p in first] == [p.id for p in own]
    found = [p.correct.startswith("Magic") for p in first]
    assert any(found)
    assert not all(found)
    assert (report.pairs, report.kept) == (8, 0)

    text = "Correct answer: New {0}.\nIncorrect answer: Else {0}.\n"
    scripted.answer = lambda n: completion(text.format(n) if n else "I cannot tell.")
    config = replace(config, retry_failed=False)
    report = refine(tiny_policy, tmp_path / "1", first, config)
    later = read_pairs(tmp_path / "1" / "pairs.jsonl")
    assert later[0] == first[0]  # it failed, so the old one stays
    assert (report.pairs, report.kept) == (8, 1)
    # What the model wrote first as the incorrect answer stays, on the side where it was.
    for before, now, was_turned in zip(first[1:], later[1:], found[1:], strict=True):
        new = f"New {now.id[1:]}."
        sides = (before.correct, new) if was_turned else (new, before.incorrect)
        assert (now.correct, now.incorrect, now.iteration) == (*sides, 1)
        assert f"Magic {now.id[1:]}." in sides


def test_a_later_round_asks_the_right_question_of_mismatched_pairs(tiny_policy, tmp_path, scripted):
    config = replace(PAPER, labels="mismatched")
    make(tiny_policy, tmp_path, config)
    first = read_pairs(tmp_path / "pairs.jsonl")
    refine(tiny_policy, tmp_path / "1", first, config)
    later = read_pairs(tmp_path / "1" / "pairs.jsonl")
    texts = {q.id: q.text for q in QUESTIONS}
    assert [p.id for p in later] == [p.id for p in first]
    for before, now in zip(first, later, strict=True):
        assert now.question == before.question != texts[now.id]
        assert now.incorrect == before.incorrect


def own_sealed() -> dict[str, Sealed]:
    return {q.id: Sealed(q.text, f"True {q.id}.", f"False {q.id}.") for q in QUESTIONS[:7]}


def test_annotated_labels_take_the_sealed_answers(tiny_policy, tmp_path, scripted, monkeypatch):
    monkeypatch.setattr(labels, "read_sealed", own_sealed)
    config = replace(PAPER, labels="annotated")
    report = make(tiny_policy, tmp_path, config)
    first = read_pairs(tmp_path / "pairs.jsonl")
    assert [(p.id, p.correct, p.incorrect) for p in first] == [
        (f"q{i}", f"True q{i}.", f"False q{i}.") for i in (0, 1, 2, 4, 6)
    ]
    assert report.rejected == {"no_sealed_answer": 3, "no_correct": 1, "equal": 1}
    refine(tiny_policy, tmp_path / "1", first, replace(config, retry_failed=False))
    later = read_pairs(tmp_path / "1" / "pairs.jsonl")
    assert [(p.id, p.correct) for p in later] == [(p.id, p.correct) for p in first]
    monkeypatch.setattr(labels, "read_sealed", dict)
    with pytest.raises(RunError, match=r"labels=annotated is for questions.source=own"):
        make(tiny_policy, tmp_path / "none", config)


def test_nothing_but_annotated_labels_opens_the_sealed_answers(
    tiny_policy, tmp_path, scripted, monkeypatch
):
    class Opened(BaseException):
        pass

    real = Path.read_bytes

    def guarded(path):
        if Path(path).name == SEALED:
            raise Opened
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", guarded)
    with pytest.raises(Opened):
        make(tiny_policy, tmp_path / "annotated", replace(PAPER, labels="annotated"))
    for kind in ("own", "random", "inverted"):
        config = replace(PAPER, labels=kind, flipped=0.25)
        make(tiny_policy, tmp_path / kind, config)
        refine(tiny_policy, tmp_path / "1", read_pairs(tmp_path / kind / "pairs.jsonl"), config)
    # No other module knows the file's name, and no stage calls its reader.
    naming, calling = [], []
    for path in Path(grath_utils.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        naming += [path.name] * (SEALED.removesuffix(".jsonl") in text)
        calling += [path.name] * bool(re.search(r"read_sealed\(\)(?! ->)", text))
    assert naming == ["labels.py"]
    # The reader of notebook 1 writes a judge, and is told how it does on sealed answers.
    assert sorted(calling) == ["labels.py", "nb01.py"]


# --- their file ----------------------------------------------------------------------------------

ROW = {"id": "a", "correct": "x", "incorrect": "y", "source": "a book"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**ROW, "correct": 3}], r'line 1: "correct" is 3'),
        ([ROW, {"id": "b"}], r'line 2: "correct" is None'),
        ([{**ROW, "id": "c"}], r'row 1 \("c"\): none of our questions'),
        ([ROW, ROW], r'row 2 \("a"\): doubled'),
        ([{**ROW, "incorrect": "x "}], r'row 1 \("a"\): equal'),
        ([{**ROW, "incorrect": ""}], r'row 1 \("a"\): empty'),
    ],
)
def test_damaged_sealed_answers(tmp_path, monkeypatch, rows, message):
    monkeypatch.setattr(labels, "data_dir", lambda: tmp_path)
    questions = [{"id": "a", "question": "Why?"}, {"id": "b", "question": "Who?"}]
    write_jsonl(tmp_path / "questions.jsonl", questions)
    write_jsonl(tmp_path / SEALED, [ROW])
    assert read_sealed() == {"a": Sealed("Why?", "x", "y")}
    write_jsonl(tmp_path / SEALED, rows)
    with pytest.raises(DataError, match=message):
        read_sealed()


def test_rows_say_what_the_judge_said(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [pair.to_row() for pair in PAIRS[:2]])
    assert read_jsonl(tmp_path / "p.jsonl")[1]["swapped"] is True
    assert read_pairs(tmp_path / "p.jsonl") == PAIRS[:2]
    for fault in ({"truth": True}, {"swapped": 1}, {"swapped": "yes"}):
        write_jsonl(tmp_path / "p.jsonl", [PAIRS[0].to_row() | fault])
        with pytest.raises(DataError, match=f'"{next(iter(fault))}" is'):
            read_pairs(tmp_path / "p.jsonl")
