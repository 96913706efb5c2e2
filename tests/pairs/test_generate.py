"""Pair generation: the files, refinement, interruptions, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from scripted import (
    ANNOTATED,
    DEFAULT,
    PAPER,
    QUESTIONS,
    Scripted,
    answering,
    completion,
    killed_after,
    make,
    read_all,
    refine,
)

from grath_utils import engine
from grath_utils.config import PairsConfig
from grath_utils.engine.generation import Completion
from grath_utils.errors import DataError, RunError
from grath_utils.files import read_jsonl, write_jsonl
from grath_utils.pairs import default
from grath_utils.pairs.generate import Pair, read_pairs
from grath_utils.pairs.parsing import Reason
from grath_utils.pairs.questions import Question


@pytest.fixture
def scripted(monkeypatch) -> Scripted:
    script = Scripted()
    answering(monkeypatch, script)
    return script


def scored(monkeypatch, logprob) -> None:
    """Let a function of the request stand for the model's log-probability."""

    def score(policy, requests):
        return [SimpleNamespace(logprob=logprob(request), tokens=2) for request in requests]

    monkeypatch.setattr(engine, "score_completions", score)


# --- the files -----------------------------------------------------------------------------------


def test_pairs_and_rejects_account_for_every_question(tiny_policy, tmp_path, scripted):
    report = make(tiny_policy, tmp_path)
    pairs = read_pairs(tmp_path / "pairs.jsonl")
    rejects = read_jsonl(tmp_path / "rejects.jsonl")
    assert [p.id for p in pairs] == [f"q{i}" for i in range(10) if i not in (3, 5)]
    assert pairs[0] == Pair("q0", QUESTIONS[0].text, "Force 0.", "Magic 0.")
    assert [(r["id"], r["reason"]) for r in rejects] == [("q3", "no_correct"), ("q5", "equal")]
    assert rejects[0]["completion"] == "I would rather not."
    assert (report.questions, report.pairs, report.kept) == (10, 8, 0)
    assert report.rejected == {"no_correct": 1, "equal": 1}
    assert report.completions == 10
    assert len(scripted.asked) == 10
    assert not (tmp_path / "pairs.jsonl.journal").exists()
    assert "8 pairs from 10 questions" in str(report)


def test_filters_can_be_switched_off(tiny_policy, tmp_path, scripted):
    config = replace(PAPER, filters=("none",))
    assert make(tiny_policy, tmp_path, config).rejected == {"no_correct": 1}


def test_legacy_keeps_equal_pairs(tiny_policy, tmp_path, scripted):
    report = make(tiny_policy, tmp_path, replace(PAPER, legacy=True))
    kept = {row["id"]: row for row in read_jsonl(tmp_path / "pairs.jsonl")}
    assert (kept["q5"]["correct"], kept["q5"]["incorrect"]) == ("Wind.", "wind")
    assert report.rejected == {"no_incorrect": 1}


@pytest.mark.parametrize("config", [replace(PAPER, legacy=True), replace(PAPER, filters=("none",))])
def test_what_cannot_be_read_again_is_not_written(tiny_policy, tmp_path, scripted, config):
    texts = ["Correct answer: \nIncorrect answer: x", "Correct answer: x\nIncorrect answer: \u200b"]
    texts += ["Correct answer: x\nIncorrect answer: x", "Correct answer: caf\u00e9"]
    texts[-1] += "\nIncorrect answer: cafe\u0301"
    scripted.answer = lambda n: completion(texts[n]) if n < 4 else Scripted.default(n)
    make(tiny_policy, tmp_path, config)
    first = read_pairs(tmp_path / "pairs.jsonl")
    assert [p.id for p in first] == [f"q{n}" for n in range(4, 10)]
    reasons = [row["reason"] for row in read_jsonl(tmp_path / "rejects.jsonl")]
    assert reasons == ["empty", "empty", "equal", "equal"]
    refine(tiny_policy, tmp_path / "1", first, config)


def test_answer_cut_off_at_the_limit_is_rejected(tiny_policy, tmp_path, scripted):
    text = "Correct answer: Force one.\nIncorrect answer: Magic by the"
    scripted.answer = lambda n: completion(text, "length" if n == 0 else "eos")
    make(tiny_policy, tmp_path)
    (reject,) = read_jsonl(tmp_path / "rejects.jsonl")
    assert (reject["id"], reject["reason"]) == ("q0", "cut_off")


def test_no_pair_at_all_is_an_error(tiny_policy, tmp_path, scripted):
    scripted.answer = lambda n: completion("No.")
    with pytest.raises(RunError, match=r"none of 10 questions .*10 no_correct.*try pairs.mode=def"):
        make(tiny_policy, tmp_path)
    assert not (tmp_path / "pairs.jsonl").exists()
    with pytest.raises(RunError, match=r"does not follow the prompt; try more questions"):
        make(tiny_policy, tmp_path / "default", DEFAULT)
    same = [replace(ANNOTATED[0], candidates=("a", "A"))]
    with pytest.raises(RunError, match=r"1 equal\): look at the options that the source gives"):
        make(tiny_policy, tmp_path / "random", PairsConfig(mode="random"), same)


def test_self_check_drops_what_the_model_does_not_believe(
    tiny_policy, tmp_path, scripted, monkeypatch
):
    believed = {"Force 1.": -9.0, "Magic": -5.0, "": -1.0}  # the first that is in the completion
    scored(monkeypatch, lambda r: next(v for k, v in believed.items() if k in r.completion))
    make(tiny_policy, tmp_path, replace(PAPER, self_check=True))
    reasons = {r["id"]: r["reason"] for r in read_jsonl(tmp_path / "rejects.jsonl")}
    assert reasons["q1"] == "self_check"
    assert list(reasons.values()).count("self_check") == 1


# --- refinement ----------------------------------------------------------------------------------


def test_refinement_renews_the_correct_answer_only(tiny_policy, tmp_path, scripted):
    make(tiny_policy, tmp_path)
    first = read_pairs(tmp_path / "pairs.jsonl")

    def second(number: int) -> Completion:
        if number == 0:
            return completion("I cannot tell.")  # fails: the old pair stays
        if number == 1:
            return completion("Correct answer: magic 1\nIncorrect answer: Else.\n")  # equal: stays
        return completion(f"Correct answer: New {number}.\nIncorrect answer: Else {number}.\n")

    scripted.answer = second
    report = refine(tiny_policy, tmp_path / "1", first)
    new = {p.id: p for p in read_pairs(tmp_path / "1" / "pairs.jsonl")}
    assert new["q0"] == first[0]
    assert new["q1"] == first[1]
    assert new["q2"] == Pair("q2", QUESTIONS[2].text, "New 2.", "Magic 2.", iteration=1)
    # Failed in iteration 0, tried again: both answers are of now.
    assert new["q3"] == Pair("q3", QUESTIONS[3].text, "New 3.", "Else 3.", iteration=1)
    assert (report.pairs, report.kept) == (10, 2)
    rejects = read_jsonl(tmp_path / "1" / "rejects.jsonl")
    assert [(r["id"], r["reason"]) for r in rejects] == [("q0", "no_correct"), ("q1", "equal")]
    assert {r["iteration"] for r in rejects} == {1}


def test_failed_questions_can_be_left_alone(tiny_policy, tmp_path, scripted):
    make(tiny_policy, tmp_path)
    first = read_pairs(tmp_path / "pairs.jsonl")
    scripted.asked.clear()
    refine(tiny_policy, tmp_path / "1", first, replace(PAPER, retry_failed=False))
    assert len(scripted.asked) == 8
    assert len(read_pairs(tmp_path / "1" / "pairs.jsonl")) == 8


def test_a_missing_incorrect_answer_does_not_matter_in_refinement(tiny_policy, tmp_path, scripted):
    make(tiny_policy, tmp_path)
    first = read_pairs(tmp_path / "pairs.jsonl")
    scripted.answer = lambda n: completion(f"Correct answer: New {n}.")
    refine(tiny_policy, tmp_path / "1", first, replace(PAPER, retry_failed=False))
    new = read_pairs(tmp_path / "1" / "pairs.jsonl")
    assert all(p.iteration == 1 and p.incorrect.startswith("Magic") for p in new)


def test_refinement_of_strangers_is_refused(tiny_policy, tmp_path, scripted):
    stranger = Pair("zz", "Why?", "a", "b")
    with pytest.raises(DataError, match=r"no question, first: zz"):
        refine(tiny_policy, tmp_path, [stranger])
    with pytest.raises(DataError, match="is for later rounds"):
        refine(tiny_policy, tmp_path, [stranger], iteration=0)


# --- mode default --------------------------------------------------------------------------------


class ScriptedCandidates:
    """Answers the three kinds of prompt, greedy and sampled."""

    def __call__(self, policy, prompts, *, keys=None):
        texts = [policy.tokenizer.decode(ids) for ids in prompts]
        out = []
        for text, key in zip(texts, keys or [""] * len(texts), strict=True):
            tail = text[text.rindex("<|im_start|>user") :]
            if "Consider the following" in tail:
                out.append(
                    completion("Correct answer: Gravity pulls it.\nIncorrect answer: Wind.\n")
                )
            elif "truthfully" in tail:
                out.append(completion("Gravity pulls it down." if not key else "Gravity does it."))
            else:
                out.append(completion("A ghost pushes it." if not key else "I don't know."))
        return out


@pytest.fixture
def candidates(monkeypatch):
    answering(monkeypatch, ScriptedCandidates())


def test_default_mode_takes_the_clearest_contrast(tiny_policy, tmp_path, candidates, monkeypatch):
    scored(
        monkeypatch,
        lambda r: -3.0 if "say something true" in r.prompt else -5.0 + 4 * ("Grav" in r.completion),
    )
    report = make(tiny_policy, tmp_path, DEFAULT, QUESTIONS[:2])
    for pair in read_pairs(tmp_path / "pairs.jsonl"):
        assert pair.correct.startswith("Gravity")
        assert not pair.incorrect.startswith("Gravity")
        assert pair.contrast > 0
    assert report.completions == 2 * (1 + 2 + 2)
    assert report.rejected == {"non_answer": 2}


def test_default_mode_refines_against_the_first_incorrect_answer(tiny_policy, tmp_path, candidates):
    old = [Pair("q0", QUESTIONS[0].text, "Old answer.", "It was blown away.")]
    report = refine(
        tiny_policy, tmp_path, old, replace(DEFAULT, retry_failed=False), questions=QUESTIONS[:1]
    )
    (new,) = read_pairs(tmp_path / "pairs.jsonl")
    assert new.incorrect == "It was blown away."
    assert report.completions == 1 + 2  # none for the incorrect answer
    assert new == old[0] or new.iteration == 1


def test_pairs_of_default_mode_are_alike_in_length_and_negation():
    assert default.balanced("The heat leaves it.", "The cold enters it.")
    assert not default.balanced("The heat leaves it.", "The heat does not leave.")
    assert not default.balanced("Heat.", "The cold enters it from the air all around.")


def test_agreement_counts_no_vote_for_oneself():
    votes = {"abc": 1, "abd": 2, "xyz": 0}
    lone, shared, odd = (default.agreement(votes, answer) for answer in votes)
    assert shared > lone > odd == 0
    assert default.agreement({"abc": 1}, "abc") == 0.0


# --- interruptions: the journal itself is tested with the files -----------------------------------


@pytest.mark.parametrize("config", [PAPER, DEFAULT], ids=["paper", "default"])
def test_a_killed_run_resumes_with_the_same_bytes(tiny_policy, tmp_path, monkeypatch, config):
    """The tiny model itself writes in mode default; its babble passes when nothing is filtered."""
    config = replace(config, filters=("none",))
    script = Scripted()
    if config.mode == "paper":
        answering(monkeypatch, script)
    make(tiny_policy, tmp_path / "whole", config)
    for chunks in (0, 1, 2):
        folder = tmp_path / f"killed-{chunks}"
        with killed_after(chunks):
            make(tiny_policy, folder, config)
        assert not (folder / "pairs.jsonl").exists()
        script.asked.clear()
        assert make(tiny_policy, folder, config).resumed == 4 * chunks
        assert len(script.asked) in (0, 10 - 4 * chunks)  # none is asked twice
        assert read_all(folder) == read_all(tmp_path / "whole")


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"config": replace(PAPER, shots=2)}, {"questions": QUESTIONS[:9]}],
    ids=["seed", "config", "questions"],
)
def test_a_journal_of_other_inputs_is_not_continued(tiny_policy, tmp_path, scripted, change):
    with killed_after(2):
        make(tiny_policy, tmp_path)
    with pytest.warns(UserWarning, match="other inputs"):
        assert make(tiny_policy, tmp_path, **change).resumed == 0


# --- bad input -----------------------------------------------------------------------------------


def test_question_longer_than_the_context(tiny_policy, tmp_path, scripted):
    long = Question("long", "Why " * 2100 + "number 99 ?", where="my.jsonl, line 7")
    with pytest.raises(DataError, match=r'my.jsonl, line 7 \("long"\): its prompt has'):
        make(tiny_policy, tmp_path, questions=[*QUESTIONS, long])
    report = make(tiny_policy, tmp_path, questions=[*QUESTIONS, long], skip_long=True)
    assert report.rejected["too_long"] == 1
    assert read_jsonl(tmp_path / "rejects.jsonl")[-1]["reason"] == Reason.TOO_LONG


def test_bad_questions_and_options(tiny_policy, tmp_path, scripted):
    with pytest.raises(DataError, match="no questions"):
        make(tiny_policy, tmp_path, questions=[])
    with pytest.raises(DataError, match='2 questions have the id "q0"'):
        make(tiny_policy, tmp_path, questions=[QUESTIONS[0], QUESTIONS[0]])
    with pytest.raises(DataError, match="this one has none"):
        make(tiny_policy, tmp_path, replace(PAPER, annotated=True))


def test_annotated_mode_shows_the_candidates(tiny_policy, tmp_path, scripted):
    question = replace(QUESTIONS[0], candidates=("gravity", "a ghost"), gold=0)
    make(tiny_policy, tmp_path, replace(PAPER, annotated=True), [question])
    assert "gravity; a ghost" in scripted.asked[0]
    scripted.asked.clear()
    make(tiny_policy, tmp_path / "plain", PAPER, [question])
    assert "a ghost" not in scripted.asked[0]


def test_ground_truth_shows_the_annotated_answer_and_a_wrong_one(tiny_policy, tmp_path, scripted):
    config = replace(PAPER, ground_truth=True)
    question = replace(QUESTIONS[0], candidates=("a ghost", "gravity"), gold=1)
    make(tiny_policy, tmp_path, config, [question])
    known = "A correct answer is known: {}\nSo is an incorrect answer: {}\n"
    assert known.format("gravity", "a ghost") in scripted.asked[0]
    assert known.format("78 years", "51 years") in scripted.asked[0]
    with pytest.raises(DataError, match="needs to know which candidate is right"):
        make(tiny_policy, tmp_path / "no_gold", config, [replace(question, gold=None)])
    same = replace(question, candidates=("gravity", "Gravity "), where="q.jsonl, line 7")
    with pytest.raises(DataError, match=r'line 7: .*needs a wrong answer.* all .*"gravity"'):
        make(tiny_policy, tmp_path / "same", config, [same])
    twice = replace(question, candidates=("gravity", "GRAVITY", "a ghost"), gold=0)
    make(tiny_policy, tmp_path / "twice", config, [twice])
    assert "So is an incorrect answer: a ghost\n" in scripted.asked[-1]
    with pytest.raises(DataError, match=r"pairs.ground_truth=true needs questions with candidates"):
        make(tiny_policy, tmp_path / "none", config)


def test_the_words_of_a_prompt_file(tiny_policy, tmp_path, scripted):
    file = tmp_path / "prompt.yaml"
    shot = "{question: 'Is it?', correct: It is., incorrect: No., candidates: [yes it is, never]}"
    file.write_text(
        f"instruction: 'Ask {{question}} in {{braces}}'\ndemonstrations: [{shot}]\n"
        "ground_truth: '{question}? {correct}! {incorrect}!'\n"
        "labels: {correct: 'True answer:', incorrect: 'False answer:'}\n"
    )
    question = Question("q", "Does number 0 fall?", ("a stone", "a hill"), 0)
    config = replace(PAPER, prompt_file=str(file))
    make(tiny_policy, tmp_path / "plain", config, [question])
    make(tiny_policy, tmp_path / "known", replace(config, ground_truth=True), [question])
    plain, known = scripted.asked
    assert "Ask Does number 0 fall? in {braces}" in plain
    assert "Question: Is it?\nTrue answer: It is.\nFalse answer: No." in plain
    assert "Is it?? yes it is! never!" in known
    assert "Does number 0 fall?? a stone! a hill!" in known


def test_gold_mode_takes_the_source_at_its_word(tiny_policy, tmp_path, scripted):
    gold = PairsConfig(mode="gold", shots=1)
    report = make(tiny_policy, tmp_path, gold, ANNOTATED)
    assert scripted.asked == []
    assert report.completions == 0
    first = read_pairs(tmp_path / "pairs.jsonl")
    for pair, question in zip(first, ANNOTATED, strict=True):
        assert pair.correct == question.candidates[question.gold]
        assert pair.incorrect in set(question.candidates) - {pair.correct}
    refine(tiny_policy, tmp_path / "later", first, gold, questions=ANNOTATED)
    later = read_pairs(tmp_path / "later" / "pairs.jsonl")
    assert [(p.correct, p.incorrect) for p in later] == [(p.correct, p.incorrect) for p in first]
    with pytest.raises(DataError, match="gold needs questions with candidates"):
        make(tiny_policy, tmp_path / "none", gold, [QUESTIONS[0]])
    with pytest.raises(DataError, match="mode=gold needs to know which candidate is right, and"):
        make(tiny_policy, tmp_path / "none", gold, [replace(ANNOTATED[0], gold=None)])


def test_random_mode_draws_lots(tiny_policy, tmp_path, scripted):
    mode = PairsConfig(mode="random", shots=1)
    many = [replace(ANNOTATED[0], id=f"q{i}", text=f"What falls in case {i}?") for i in range(60)]
    report = make(tiny_policy, tmp_path, mode, many)
    assert scripted.asked == []
    assert (report.pairs, report.completions) == (60, 0)
    first = read_pairs(tmp_path / "pairs.jsonl")
    refine(tiny_policy, tmp_path / "later", first, mode, questions=many)
    later = read_pairs(tmp_path / "later" / "pairs.jsonl")
    assert [p.incorrect for p in later] == [p.incorrect for p in first]
    for pairs in (first, later):
        assert all(pair.correct != pair.incorrect for pair in pairs)
        # By chance a third is right: 20 of 60, with a standard deviation of 3.7.
        assert 5 <= sum(pair.correct == "a stone" for pair in pairs) <= 42
    with pytest.raises(DataError, match="random needs questions with candidates"):
        make(tiny_policy, tmp_path / "none", mode, [QUESTIONS[0]])


def test_pick_mode_lets_the_model_judge_what_others_wrote(tiny_policy, tmp_path, monkeypatch):
    credible = {"a stone": -1.0, "a hill": -3.0, "a lake": -2.0}
    credible |= {"dry wood": -3.0, "a pebble": -1.0, "water": -2.0}

    def judge(request):
        answer = request.completion.removesuffix("<|im_end|>").strip()
        return 0.0 if "say something true" in request.prompt else credible[answer]

    scored(monkeypatch, judge)
    pick = PairsConfig(mode="pick", shots=1)
    report = make(tiny_policy, tmp_path, pick, ANNOTATED)
    assert report.completions == 0
    first = read_pairs(tmp_path / "pairs.jsonl")
    # The gold of the second question is what the model believes least: it is not told.
    assert [(p.correct, p.incorrect) for p in first] == [
        ("a stone", "a hill"),
        ("a pebble", "dry wood"),
    ]
    credible |= {"a stone": -2.0, "a lake": -1.0}  # the trained model sees it otherwise
    refine(tiny_policy, tmp_path / "later", first, pick, questions=ANNOTATED)
    later = read_pairs(tmp_path / "later" / "pairs.jsonl")
    assert [(p.correct, p.incorrect) for p in later] == [
        ("a lake", "a hill"),
        ("a pebble", "dry wood"),
    ]
    with pytest.raises(DataError, match="pick needs questions with candidates"):
        make(tiny_policy, tmp_path / "none", pick, [QUESTIONS[0]])


@pytest.mark.parametrize("mode", ["gold", "random"])
@pytest.mark.parametrize("options", [("here", "here"), ("here", "Here.")])
def test_options_that_are_the_same_are_rejected(tiny_policy, tmp_path, mode, options):
    same = Question("c", "Where?", options, 1)
    config = PairsConfig(mode=mode)
    report = make(tiny_policy, tmp_path, config, [*ANNOTATED, same])
    assert (report.pairs, report.rejected) == (2, {"equal": 1})
    first = [*read_pairs(tmp_path / "pairs.jsonl"), Pair("c", "Where?", "there", "here")]
    refine(tiny_policy, tmp_path / "later", first, config, questions=[*ANNOTATED, same])


PAIR = {"id": "a", "question": "Why?", "correct": "x", "incorrect": "y", "iteration": 0}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no pair in it"),
        ([PAIR, {**PAIR, "id": "b", "correct": " "}], 'pair 2: "correct" is missing or no text'),
        ([{k: v for k, v in PAIR.items() if k != "incorrect"}], 'pair 1: "incorrect" is missing'),
        ([PAIR, PAIR], 'pair 2: id "a" is that of pair 1'),
        ([{**PAIR, "incorrect": "x "}], 'both answers are "x"'),
        ([{**PAIR, "correct": "\u00e9", "incorrect": "e\u0301"}], 'both answers are "\u00e9"'),
        ([{**PAIR, "incorrect": "\u200b"}], '"incorrect" is missing or no text'),
        ([{**PAIR, "iteration": -1}], '"iteration" is -1; expected 0, 1, 2'),
        ([{**PAIR, "contrast": "big"}], '"contrast" is .big.; expected a number'),
        ([{**PAIR, "contrast": True}], '"contrast" is True; expected a number'),
        ([{**PAIR, "iteration": True}], '"iteration" is True; expected a whole number'),
        ([{**PAIR, "id": True}], '"id" is missing or no text; found True'),
    ],
)
def test_bad_pair_files(tmp_path, rows, message):
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, rows)
    with pytest.raises(DataError, match=message):
        read_pairs(path)


def test_pair_round_trip(tmp_path):
    pairs = [Pair("a", "Why?", "x", "y", 2, 0.5), Pair("b", "Who?", "v", "w")]
    write_jsonl(tmp_path / "p.jsonl", [p.to_row() for p in pairs])
    assert read_pairs(tmp_path / "p.jsonl") == pairs
    assert "contrast" not in json.loads((tmp_path / "p.jsonl").read_text().splitlines()[1])


# --- the real model ------------------------------------------------------------------------------


@pytest.mark.model
def test_default_model_writes_pairs_in_both_modes(default_policy, tmp_path):
    questions = [
        Question("a", "Which organ pumps blood through the body?"),
        Question("b", "Why do leaves look green?"),
        Question("c", "What do bees collect from flowers?"),
        Question("d", "What is ice made of?"),
    ]
    paper = make(default_policy, tmp_path / "paper", PairsConfig(mode="paper"), questions)
    default = make(default_policy, tmp_path / "default", PairsConfig(candidates=2), questions)
    assert default.pairs >= paper.pairs >= 1
    assert paper.pairs + sum(paper.rejected.values()) == 4
    for pair in read_pairs(tmp_path / "default" / "pairs.jsonl"):
        assert pair.contrast > 0
