"""The parser on what models write, and on anything; the filters one by one."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grath_utils.pairs.parsing import (
    FILTERS,
    Parsed,
    Reason,
    check_answer,
    check_pair,
    clean,
    echoes,
    near_equal,
    pair_is_complete,
    parse_legacy,
    parse_pair,
    unusable,
)
from grath_utils.pairs.words import same_wording

GOOD = ("It cools.", "It burns.")


@pytest.mark.parametrize(
    "completion",
    [
        "Question: Why?\nCorrect answer: It cools.\nIncorrect answer: It burns.",
        "Incorrect answer: It burns.\nCorrect answer: It cools.",
        "1. Correct answer: It cools.\n2. Incorrect answer: It burns.",
        "(a) Correct Answer: It cools.\n(b) INCORRECT ANSWER: It burns.",
        "- **Correct answer:** It cools.\n- **Incorrect answer:** It burns.",
        "**Correct answer**: It cools.\n**Incorrect answer**: It burns.",
        'Correct answer: "It cools."\nIncorrect answer: “It burns.”',
        "Correct: It cools.\nWrong: It burns.",
        "The correct answer is: It cools.\nThe incorrect answer is: It burns.",
        "Correct answer 1: It cools.\nIncorrect answer 1: It burns.",
        "Correct answer:\nIt cools.\n\nIncorrect answer:\n\nIt burns.\n",
        "Correct answer: It cools. Incorrect answer: It burns.",
        "Correct answer: It cools.\r\nIncorrect answer: It burns.\r\n",
        "Sure! Here are two answers.\nCorrect answer: It cools.\nIncorrect answer: It burns.",
        "Correct answer: It cools.\nIncorrect answer: It burns.\nExplanation: Heat leaves.",
        "Correct answer: It cools.\nBecause heat leaves.\nIncorrect answer: It burns.\nNo, really.",
        "Correct answer: It cools.\nIncorrect answer: It burns.\nCorrect answer: It melts.",
    ],
)
def test_what_models_write(completion):
    parsed = parse_pair(completion)
    assert (parsed.correct, parsed.incorrect) == GOOD
    assert parsed.reason is None


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("", Reason.NO_CORRECT),
        ("It cools.\nIncorrect answer: It burns.", Reason.NO_CORRECT),
        ("Correct answer: It cools.", Reason.NO_INCORRECT),
        ("The correct answer is that it cools and the incorrect one is not.", Reason.NO_CORRECT),
        ("Question: What is the correct answer?", Reason.NO_CORRECT),
    ],
)
def test_missing_labels(completion, reason):
    assert parse_pair(completion).reason is reason
    assert check_pair("Why?", parse_pair(completion)) is reason


def test_restated_question_is_kept_apart():
    parsed = parse_pair("Question: Why so?\nCorrect answer: a1\nIncorrect answer: b1")
    assert parsed == Parsed("a1", "b1", "Why so?")


# --- properties ----------------------------------------------------------------------------------

PIECES = 'Correct answer|Incorrect answer|Question|:|：|\n| |**|1.|x|y|-5|5|+|#|e\u0301|\u00e9|\r|"'
PIECES += "|\0|\u200b|\u00ad|\u202e|\u00a0|\u2028|\x85|\ufffd|\ud83d|\U0001f525|\u093f|不"
LABEL_SOUP = st.lists(st.sampled_from(PIECES.split("|")), max_size=40).map("".join)
TWO_ANSWERS = st.tuples(LABEL_SOUP, LABEL_SOUP).map("Correct answer: {0[0]}\nWrong: {0[1]}".format)


@given(st.text(max_size=400) | LABEL_SOUP | TWO_ANSWERS)
@example("Correct answer:" * 50)
@example("\x85Correct answer:\u2028x")
@example("Correct answer: It cools.\nIncorrect answer: It\u200b coo\u00adls")
def test_no_input_crashes_and_no_pair_is_empty_or_equal(text):
    for parsed, filters in ((parse_pair(text), list(FILTERS)), (parse_legacy(text), [])):
        reason = check_pair("Why is it so?", parsed, filters=filters)
        assert reason is None or reason in Reason
        for field in (parsed.correct, parsed.incorrect, parsed.question):
            assert field is None or (field == field.strip() and "\n" not in field)
        if reason is None:
            assert unusable(*parsed.sides) is None
            assert not filters or not near_equal(*parsed.sides)
            assert not filters or not same_wording(*parsed.sides)
            assert not filters or "\n".join(parsed.sides).encode()
    pair_is_complete(text)


@pytest.mark.parametrize(
    "filler",
    ["x", "x ", '"', "* ", " ", "!", "Correct answer: ", "a b c d ", "- 1. ", "\ufffd", "不"],
)
def test_a_long_line_takes_no_time(filler):
    """100 kB without a line's end: what grew with its square would take minutes."""
    long = filler * (100_000 // len(filler))
    parsed = parse_pair(f"Correct answer: {long}\nIncorrect answer: y {long}")
    check_pair("Why is it so?", parsed)
    check_pair("Why is it so?", Parsed(f"x y z {long}", f"x y {long} z"))
    assert parsed.reason is None
    assert parse_pair(long).reason


# Letters of a kind that no label has, so that a leak would be seen.
answers = (
    st.text(alphabet="bdfgjkmvxyz 0123456789,-'é", min_size=1, max_size=60)
    .map(lambda s: " ".join(s.split()))
    .filter(lambda s: s.strip(" ,-'") and clean(s) == s)
)
preambles = st.text(alphabet="ABDFGJKMVXYZ \n,.!", max_size=80)


@given(preambles, answers, answers, st.booleans(), st.sampled_from(["", "1. ", "- ", "**", "> "]))
def test_round_trip_and_no_preamble_in_an_answer(preamble, correct, incorrect, swap, mark):
    end = "**" if mark == "**" else ""
    lines = [f"{mark}Correct answer:{end} {correct}", f"{mark}Incorrect answer:{end} {incorrect}"]
    text = "\n".join([preamble, *(reversed(lines) if swap else lines)])
    parsed = parse_pair(text)
    assert (parsed.correct, parsed.incorrect) == (correct, incorrect)


@given(answers, answers, st.integers(min_value=0, max_value=200))
def test_stopping_early_takes_nothing_from_the_pair(correct, incorrect, cut):
    text = f"Question: q\nCorrect answer: {correct}\nIncorrect answer: {incorrect}\nmore text"
    part = text[: min(cut, len(text))]
    if pair_is_complete(part):
        assert parse_pair(part) == parse_pair(text)
    assert pair_is_complete(text)


def test_generation_goes_on_until_the_last_line_has_ended():
    text = "Correct answer: a1\nIncorrect answer: b1"
    assert not pair_is_complete(text)
    assert pair_is_complete(text + "\n")
    assert not pair_is_complete("Correct answer: a1\n")
    assert not pair_is_complete("Correct answer:\nIncorrect answer:\n")


# --- the official parser's quirks -----------------------------------------------------------------


def test_legacy_quirks():
    leak = "Sure, here you are.\nIncorrect answer: b"
    assert parse_legacy(leak) == Parsed("Sure, here you are.", "b")
    glued = "Correct answer: a\nIncorrect answer: b\nBecause"
    assert parse_legacy(glued) == Parsed("a", "bBecause")
    twice = "Correct answer: a\nIncorrect answer: b\nIncorrect answer: c"
    assert parse_legacy(twice).reason is Reason.NO_INCORRECT
    assert parse_legacy("Correct answer: a\nIncorrect answer: a") == Parsed("a", "a")


# --- filters -------------------------------------------------------------------------------------

QUESTION = "Why does a metal spoon feel cold in the hand?"
FILTERED = [
    (Parsed("It cools.", "It bur", cut_off=True), Reason.CUT_OFF),
    (Parsed("...", "It burns."), Reason.EMPTY),
    (Parsed("The heat leaves.", "the heat leaves"), Reason.EQUAL),
    (Parsed("Heat flows into the metal", "Heat flows into the metals"), Reason.NEAR_EQUAL),
    (Parsed(QUESTION, "It burns."), Reason.QUESTION_COPY),
    (Parsed("It burns.", "The metal spoon feels cold in the hand."), Reason.QUESTION_COPY),
    (Parsed("It cools.", "It burns.", "Who painted that picture?"), Reason.OTHER_QUESTION),
    (Parsed("Shown before.", "It burns."), Reason.OTHER_QUESTION),
    (Parsed("Heat.", "Cold air came in at night" * 4), Reason.LENGTH_RATIO),
    (Parsed("I don't know.", "It burns."), Reason.NON_ANSWER),
    (Parsed("It cools.", "As an AI model I cannot say."), Reason.NON_ANSWER),
    (Parsed("It cools.", "It b\ufffdrns."), Reason.NON_ANSWER),
    (Parsed("It cools.", "It burns\nand b\ufffdrns."), Reason.NON_ANSWER),
    (Parsed("It takes heat, it takes heat, it takes heat", "Heat enters it."), Reason.REPETITION),
]


@pytest.mark.parametrize(("parsed", "reason"), FILTERED)
def test_each_filter_catches_its_case_and_can_be_switched_off(parsed, reason):
    shown = ["Shown before."]
    assert check_pair(QUESTION, parsed, shown_answers=shown) is reason
    others = [name for name in FILTERS if name is not reason]
    assert check_pair(QUESTION, parsed, filters=others, shown_answers=shown) is not reason
    assert check_pair(QUESTION, parsed, filters=[], shown_answers=shown) is None


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (("It cools.", ""), Reason.EMPTY),
        (("\u200b", "It burns."), Reason.EMPTY),
        (("It cools.", "It  cools. "), Reason.EQUAL),
        (("caf\u00e9", "cafe\u0301"), Reason.EQUAL),
        (("It cools.", "It b\0rns."), Reason.NON_ANSWER),
    ],
)
def test_what_no_file_of_pairs_may_hold_is_rejected_without_filters(answers, reason):
    assert check_pair(QUESTION, Parsed(*answers), filters=[]) is reason
    assert unusable("Wind.", "wind") is None


def test_every_filter_has_a_case():
    assert {reason for _, reason in FILTERED} == set(FILTERS)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("The war ended in 1918.", "The war ended in 1919."),
        ("It is a metal.", "It is not a metal."),
        ("Cats are quick.", "Dogs are quick."),
        ("The Sun orbits the Earth.", "The Earth orbits the Moon."),
        ("It melts at -5 degrees.", "It melts at 5 degrees."),
        ("It is written in C++.", "It is written in C#."),
        ("x < 3", "x > 3"),
        ("यह कि है", "यह की है"),
    ],
)
def test_small_differences_that_matter_are_not_near_equal(a, b):
    assert not near_equal(a, b)
    assert check_pair("Why?", Parsed(a, b)) is None


def test_echoes():
    assert echoes("How does the wind build a sand dune?", "The wind builds a sand dune.")
    assert not echoes("Is gold or iron heavier?", "Gold.")
    assert not echoes("How does the wind build a sand dune?", "The wind drops grains of sand.")


def test_single_answers_are_checked_alone():
    assert check_answer(QUESTION, "Heat flows into it.") is None
    assert check_answer(QUESTION, "") is Reason.EMPTY
    assert check_answer(QUESTION, "Heat", cut_off=True) is Reason.CUT_OFF
    assert check_answer(QUESTION, "I don't know") is Reason.NON_ANSWER
    assert check_answer(QUESTION, "Old.", shown_answers=["old"]) is Reason.OTHER_QUESTION
