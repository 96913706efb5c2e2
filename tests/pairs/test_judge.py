"""Judges: the arithmetic of the letters, what becomes of a pair, and where a judge has its say."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from benchmarks.judges import try_judge
from scripted import (
    ANNOTATED,
    DEFAULT,
    PAPER,
    QUESTIONS,
    Killed,
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
from grath_utils.engine.chat import answer_form
from grath_utils.errors import ConfigError, DataError, RunError
from grath_utils.files import read_jsonl
from grath_utils.pairs import judge as judges
from grath_utils.pairs.generate import read_pairs
from grath_utils.pairs.judge import (
    JUDGES,
    Case,
    Judge,
    by_letters,
    exam_question,
    find_judge,
    letters_question,
    sceptic_question,
    verdict,
)
from grath_utils.pairs.labels import Sealed
from grath_utils.pairs.modes import MODES, check_pairs_config
from grath_utils.pairs.prompts import training_prompt
from grath_utils.pairs.writers import Rejected, Task, WrittenPair

LETTERS = replace(PAPER, judge="letters")
CASES = [
    Case("a", "Why does a stone fall?", ("Gravity pulls it.", "It wants to be below.")),
    Case("b", "What burns?", ("water", "dry wood", "a pebble")),
    Case("c", "How {many} legs has a spider?", ("eight", "six", "four", "ten", "none")),
]


# --- the letters ---------------------------------------------------------------------------------


def test_what_the_letters_ask():
    assert letters_question("Why {so}?", ["It is.", "No."]) == (
        "Question: Why {so}?\nA: It is.\nB: No.\nWhich answer is true? Reply with A or B only."
    )
    assert letters_question("Why?", list("wxyz")).endswith("Reply with A, B, C or D only.")


def test_what_the_other_judges_ask():
    assert exam_question("Why {so}?", ["It is.", "No."]) == (
        "Why {so}?\n\nA. It is.\nB. No.\n\nAnswer:"
    )
    asked = sceptic_question("Why?", ["It is.", "No."])
    assert asked.startswith("Question: Why?\nA: It is.\nB: No.\nOne of the two answers is a common")
    assert asked.endswith("give? Reply with A or B only.")


def test_two_forms_of_a_question_count_equally(tiny_policy):
    both, *forms = (JUDGES[name].weigh(tiny_policy, CASES) for name in ("both", "letters", "exam"))
    for mean, one, other in zip(both, *forms, strict=True):
        assert mean.tolist() == pytest.approx(((one + other) / 2).tolist())
        assert one.tolist() != pytest.approx(other.tolist(), abs=1e-4)


def by_hand(policy, case: Case) -> list[float]:
    """Average the letters' probabilities over the rotations, with plain forward passes."""
    n = len(case.options)
    lead, found = answer_form(policy.tokenizer).lead, [0.0] * n
    for shift in range(n):
        places = [(place + shift) % n for place in range(n)]
        shown = [case.options[place] for place in places]
        prompt = training_prompt(policy.tokenizer, letters_question(case.question, shown))
        before, logprobs = len(engine.token_ids(policy.tokenizer, prompt)), []
        for letter in "ABCDE"[:n]:
            ids = torch.tensor(engine.token_ids(policy.tokenizer, f"{prompt}{lead}{letter}"))
            with torch.inference_mode():
                each = policy.model(ids[None]).logits[0].double().log_softmax(-1)
            logprobs.append(sum(each[i - 1, ids[i]] for i in range(before, len(ids))))
        for place, share in zip(places, torch.stack(logprobs).softmax(0).tolist(), strict=True):
            found[place] += share / n
    return found


@pytest.mark.parametrize("template", [True, False], ids=["template", "no template"])
def test_the_letters_are_those_of_a_plain_forward_pass(tiny_policy, template):
    if not template:  # then a letter follows a space
        tiny_policy.tokenizer.chat_template = None
    found = by_letters(letters_question, tiny_policy, CASES)
    for case, shares in zip(CASES, found, strict=True):
        assert shares.tolist() == pytest.approx(by_hand(tiny_policy, case), abs=1e-6)
        assert shares.sum() == pytest.approx(1)
        assert len({*shares.round(9)}) == len(shares)


def test_the_order_in_which_options_come_does_not_matter(tiny_policy):
    shares = by_letters(letters_question, tiny_policy, CASES)
    for shift in (1, 2):
        turned = [c._replace(options=[*c.options[shift:], *c.options[:shift]]) for c in CASES]
        for case, now, before in zip(
            CASES, by_letters(letters_question, tiny_policy, turned), shares, strict=True
        ):
            there = [(place + shift) % len(case.options) for place in range(len(case.options))]
            assert now.tolist() == pytest.approx(before[there].tolist(), abs=1e-6)


def test_a_model_that_always_says_a_knows_nothing(tiny_policy, monkeypatch):
    def score(policy, requests):
        return [SimpleNamespace(logprob=-9.0 * (not r.completion.endswith("A"))) for r in requests]

    monkeypatch.setattr(engine, "score_completions", score)
    for case, shares in zip(CASES, by_letters(letters_question, tiny_policy, CASES), strict=True):
        assert shares.tolist() == pytest.approx([1 / len(case.options)] * len(case.options))


def test_there_are_26_letters(tiny_policy):
    many = Case("many", "Which?", list(map(str, range(27))))
    with pytest.raises(DataError, match="many: 27 answers are more than there are letters"):
        by_letters(letters_question, tiny_policy, [many])


# --- the verdict ---------------------------------------------------------------------------------

WRITTEN = WrittenPair("x", "y", (Rejected("pair", "z", "empty"),), 0.5, completions=3, tokens=9)


@pytest.mark.parametrize(
    ("truth", "first_round", "later_round"),
    [
        (0.55, "kept", "kept"),
        (0.5499999, "undecided", "undecided"),
        (0.4500001, "undecided", "undecided"),
        (0.45, "exchanged", "judged_false"),
        (0.0, "exchanged", "judged_false"),
    ],
)
def test_kept_exchanged_or_dropped(truth, first_round, later_round):
    for incorrect, expected in ((None, first_round), ("y", later_round)):
        found = verdict(Task(QUESTIONS[0], incorrect), WRITTEN, truth, LETTERS)
        assert (found.completions, found.tokens) == (3, 9)
        if expected == "kept":
            assert found == replace(WRITTEN, truth=truth, swapped=False)
        elif expected == "exchanged":
            assert (found.correct, found.incorrect, found.contrast) == ("y", "x", -0.5)
            assert (found.truth, found.swapped) == (1 - truth, True)
        else:
            assert (found.correct, found.incorrect, found.truth) == (None, None, None)
            dropped = Rejected("judge", "x\ny", expected, round(truth, 4))
            assert found.rejected == (*WRITTEN.rejected, dropped)
        assert WrittenPair.from_row(asdict(found)) == found


def test_the_thresholds_are_settings():
    config = replace(LETTERS, judge_keep=0.9, judge_swap=0.1)
    undecided = [verdict(Task(QUESTIONS[0]), WRITTEN, p, config).correct for p in (0.11, 0.89)]
    assert undecided == [None, None]
    assert verdict(Task(QUESTIONS[0]), WRITTEN, 0.9, config).swapped is False
    with pytest.raises(ConfigError, match=r'judge_swap" \(0.6\) is above "pairs.judge_keep"'):
        find_judge(replace(LETTERS, judge_swap=0.6))


# --- where a judge has its say -------------------------------------------------------------------


@pytest.fixture
def judge(monkeypatch):
    """A judge that finds true what a test tells it to, and remembers what it was asked."""
    told = SimpleNamespace(truths={}, asked=[])

    def asking(question, options):
        return "Which?"

    def by(ask, policy, cases):
        told.asked.append([case.options for case in cases])
        weights = [[told.truths.get(text, 0.5) for text in case.options] for case in cases]
        return [torch.tensor(row).numpy() / sum(row) for row in weights]

    monkeypatch.setitem(
        judges.JUDGES, "letters", Judge(name="t", summary="", asks=(asking,), by=by)
    )
    return told


def test_pairs_are_kept_exchanged_or_dropped(tiny_policy, tmp_path, monkeypatch, judge):
    answering(monkeypatch, Scripted())
    judge.truths = {"Force 0.": 0.9, "Magic 0.": 0.1, "Force 1.": 0.2, "Magic 1.": 0.8}
    config = replace(LETTERS, batch_size=8)
    report = make(tiny_policy, tmp_path, config)
    kept, turned = read_pairs(tmp_path / "pairs.jsonl")
    assert (kept.correct, kept.truth, kept.swapped) == ("Force 0.", 0.9, False)
    assert (turned.correct, turned.incorrect) == ("Magic 1.", "Force 1.")
    assert (turned.truth, turned.swapped) == (0.8, True)
    # A whole chunk at once, and only what the filters let through.
    assert [len(options) for options in judge.asked] == [8]
    assert report.rejected == {"undecided": 6, "no_correct": 1, "equal": 1}
    assert "2 pairs (1 exchanged by the judge) from 10 questions" in str(report)
    dropped = [r for r in read_jsonl(tmp_path / "rejects.jsonl") if r["reason"] == "undecided"]
    assert (dropped[0]["prompt"], dropped[0]["completion"]) == ("judge", "Force 2.\nMagic 2.")
    assert dropped[0]["truth"] == 0.5
    with pytest.raises(RunError, match=r"6 undecided.*the judge can hardly tell them apart"):
        make(tiny_policy, tmp_path / "none", config, [q for q in QUESTIONS if q.id > "q1"])


def test_a_new_correct_answer_has_to_be_judged_true(tiny_policy, tmp_path, monkeypatch, judge):
    script = Scripted()
    answering(monkeypatch, script)
    judge.truths = {f"Magic {n}.": 0.1 for n in range(10)} | {"Force 1.": 0.01}
    make(tiny_policy, tmp_path, LETTERS, QUESTIONS[:4])
    first = read_pairs(tmp_path / "pairs.jsonl")
    assert [(p.id, p.incorrect) for p in first] == [
        ("q0", "Magic 0."), ("q1", "Force 1."), ("q2", "Magic 2."),
    ]  # fmt: skip
    answer = "Correct answer: New {0}.\nIncorrect answer: Else {0}.\n"
    script.answer = lambda n: completion(answer.format(n))
    judge.truths |= {"New 0.": 0.9, "New 1.": 0.001, "New 2.": 0.1, "New 3.": 0.2, "Else 3.": 0.8}
    report = refine(tiny_policy, tmp_path / "1", first, LETTERS, questions=QUESTIONS[:4])
    later = {p.id: p for p in read_pairs(tmp_path / "1" / "pairs.jsonl")}
    assert (later["q0"].correct, later["q0"].truth, later["q0"].iteration) == ("New 0.", 0.9, 1)
    assert (later["q1"], later["q2"]) == (first[1], first[2])  # false; undecided
    # It had no pair, so both answers are new, and can be exchanged.
    assert (later["q3"].correct, later["q3"].incorrect) == ("Else 3.", "New 3.")
    assert report.rejected == {"judged_false": 1, "undecided": 1}
    assert (report.kept, report.swapped) == (2, 1)


def test_pick_takes_the_best_and_the_worst_letter(tiny_policy, tmp_path, judge):
    judge.truths = {"a stone": 0.3, "a hill": 0.6, "a lake": 0.1}
    judge.truths |= {"water": 0.2, "dry wood": 0.7, "a pebble": 0.1}
    pick = PairsConfig(mode="pick", judge="letters")
    report = make(tiny_policy, tmp_path, pick, ANNOTATED)
    first = read_pairs(tmp_path / "pairs.jsonl")
    assert [(p.correct, p.incorrect, p.truth) for p in first] == [
        ("a hill", "a lake", 0.6),
        ("dry wood", "a pebble", 0.7),
    ]
    assert (report.completions, report.rejected, len(judge.asked)) == (0, {}, 1)
    judge.truths |= {"a hill": 0.2, "dry wood": 0.01, "water": 0.02}
    refine(tiny_policy, tmp_path / "1", first, pick, questions=ANNOTATED)
    later = read_pairs(tmp_path / "1" / "pairs.jsonl")
    assert (later[0].correct, later[0].incorrect) == ("a stone", "a lake")
    assert later[1] == first[1]  # no option is better than the incorrect one


@pytest.mark.parametrize("config", [LETTERS, replace(DEFAULT, judge="letters")])
def test_a_run_killed_while_it_judges_ends_with_the_same_bytes(
    tiny_policy, tmp_path, monkeypatch, config
):
    """The tiny model judges itself; in mode default it writes, too."""
    config = replace(config, filters=("none",), judge_keep=0.5, judge_swap=0.5)
    if config.mode == "paper":
        answering(monkeypatch, Scripted())
    make(tiny_policy, tmp_path / "whole", config)
    make(tiny_policy, tmp_path / "again", config)
    assert read_all(tmp_path / "again") == read_all(tmp_path / "whole")
    assert all(p.truth is not None for p in read_pairs(tmp_path / "whole" / "pairs.jsonl"))
    with killed_after(1):
        make(tiny_policy, tmp_path / "killed", config)

    def dying(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(judges, "verdict", dying)
        make(tiny_policy, tmp_path / "killed", config)
    assert make(tiny_policy, tmp_path / "killed", config).resumed == 4
    assert read_all(tmp_path / "killed") == read_all(tmp_path / "whole")


def test_a_journal_of_another_judge_is_not_continued(tiny_policy, tmp_path, monkeypatch):
    answering(monkeypatch, Scripted())
    with killed_after(1):
        make(tiny_policy, tmp_path, LETTERS)
    monkeypatch.setitem(
        judges.JUDGES,
        "letters",
        replace(judges.JUDGES["letters"], asks=(lambda *_: "Other words.",)),
    )
    for config in (LETTERS, replace(LETTERS, judge_keep=0.5), PAPER):
        with killed_after(1), pytest.warns(UserWarning, match="other inputs"):
            make(tiny_policy, tmp_path, config)


# --- settings ------------------------------------------------------------------------------------


def test_modes_without_a_model_refuse_a_judge():
    for mode in MODES:
        config = PairsConfig(mode=mode, judge="letters")
        if mode in ("gold", "random"):
            with pytest.raises(ConfigError, match=f'"pairs.judge" belongs to .*pick; with {mode}'):
                check_pairs_config(config)
        else:
            assert check_pairs_config(config).name == mode
    with pytest.raises(ConfigError, match='"pairs.judge" cannot be "leters"; did you mean "lett'):
        check_pairs_config(PairsConfig(judge="leters"))


@pytest.mark.parametrize(("name", "forms"), [("letters", 1), ("both", 2)])
def test_a_judge_costs_two_prompts_a_pair_and_form(name, forms):
    for mode, more in (("paper", 2 * forms), ("default", 2 * forms), ("pick", 0)):
        for iteration in (0, 1):
            without, judged = (
                MODES[mode].asked(PairsConfig(mode=mode, judge=judge), iteration)
                for judge in ("none", name)
            )
            assert judged == without._replace(scored=without.scored + more)


def test_a_judge_is_tried_on_answers_that_are_known(monkeypatch):
    config = PairsConfig(judge="letters", judge_keep=0.7, judge_swap=0.3)
    truths = {"sure": 0.9, "edge": 0.7, "nearly": 0.6, "half": 0.5, "wrong": 0.3}

    def weigh(self, policy, cases):
        assert [(c.question, *c.options) for c in cases[:1]] == [("sure?", "yes", "no")]
        return [[truths[c.item], 1 - truths[c.item]] for c in cases]

    monkeypatch.setattr(Judge, "weigh", weigh)
    trial = try_judge(
        None, config, JUDGES["letters"], {k: Sealed(f"{k}?", "yes", "no") for k in truths}
    )
    assert trial == (5, 3, 3, 2)
