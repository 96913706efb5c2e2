"""Words, signs and negations, and when two texts are the same, in any script."""

from __future__ import annotations

from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grath_utils.evaluation.blind_rules import RULES
from grath_utils.pairs.words import (
    NEGATIONS,
    answer_words,
    is_blank,
    negated,
    same_text,
    same_wording,
    signs,
    split_words,
)

SAME = [
    ("What is a caf\u00e9?", "What is a cafe\u0301?"),  # NFC and NFD
    ("\u1e69", "s\u0307\u0323"),  # two marks, in the other order
    ("WHAT IS  ICE?", " what\u00a0is\u2003ice?\u3000"),
    ("Wo ist \u03a3\u03cd\u03c1\u03bf\u03c2?", "WO IST \u03a3\u038e\u03a1\u039f\u03a3?"),
    ("What\ufeff is\u200b ice?", "What is ice?"),  # zero width
    ("co\u00adoperate", "cooperate"),  # a soft hyphen
    ("\u200eWho?\u200f", "Who?"),  # marks of direction
]
# With what tells them apart; None: it is no word and no sign.
DIFFERENT = [
    ("What is 2+2?", "What is 2-2?", "-"),
    ("What is 2 2?", "What is 2-2?", "-"),
    ("What is C++?", "What is C#?", "#"),
    ("What is C?", "What is C++?", "+"),
    ("Is x < 3?", "Is x > 3?", ">"),
    ("Is 5 odd?", "Is -5 odd?", "-"),
    ("Is 5 odd?", "Is \u22125 odd?", "-"),
    ("10", "10 %", "%"),
    ("$5", "\u20ac5", "\u20ac"),
    ("1 2", "1/2", "/"),
    ("What does \U0001f9ca mean?", "What does \U0001f525 mean?", "\U0001f525"),
    ("\U0001f1e9\U0001f1ea", "\U0001f1eb\U0001f1f7", "\U0001f1eb"),  # two flags
    ("\u092f\u0939 \u0915\u093f \u0939\u0948?", "\u092f\u0939 \u0915\u0940 \u0939\u0948?", ""),
    ("\u0e44\u0e21\u0e48", "\u0e44\u0e21\u0e49", ""),  # Thai tones
    ("Was it 1.5?", "Was it 15?", ""),
    ("\u0130", "\u0131", ""),  # Turkish
    ("In Ma\u00dfen?", "In Massen?", None),  # in moderation, in masses
    ("Is it?", "Is it", None),
    ("What is (a b) c?", "What is a (b c)?", None),
    ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u062e", None),  # a joiner of Persian
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_texts_that_are_the_same(a, b):
    assert same_text(a) == same_text(b)
    assert same_wording(a, b)


@pytest.mark.parametrize(("a", "b", "mark"), DIFFERENT)
def test_texts_that_differ(a, b, mark):
    assert same_text(a) != same_text(b)
    assert same_wording(a, b) is (mark is None)
    assert not mark or mark in signs(b)


@given(st.text())
def test_the_form_of_unicode_never_matters(text):
    forms = [normalize(form, text) for form in ("NFC", "NFD")]
    for rule in (same_text, answer_words, signs, negated, is_blank):
        assert rule(forms[0]) == rule(forms[1])
    assert same_text(same_text(text)) == same_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "\u200b",
        "\ufeff\u2060",
        "\u00ad",
        "\u202e \u202c",
        "\u0301",
        "\u3164 \u2800",
        "\0",
    ],
)
def test_texts_that_show_nothing(text):
    assert is_blank(text)
    assert not is_blank(f"{text}?")


def test_words():
    assert answer_words("It isn't so; THEY\u2019VE 2 cats.") == "it isn't so they've 2 cats".split()
    assert split_words("The cat’s 3.5 mice, and a dog") == ["cat's", "3.5", "mice", "and", "dog"]
    assert split_words("A") == ["a"]  # nothing else is left
    assert answer_words("1,000 snake_case U.S. end.Next") == [
        *("1,000", "snake", "case", "u", "s", "end", "next")
    ]
    assert answer_words("क्या हिन्दी") == ["क्या", "हिन्दी"]
    assert answer_words("a\u2060b\u00adc") == ["abc"]
    assert answer_words("... \u2764\ufe0f") == []


def test_signs_are_no_punctuation():
    assert signs("Well-known, isn't it? Covid-19; and/or (*yes*): `no`!") == []
    assert signs("-5 - 3 = -8") == ["-", "-", "=", "-"]
    assert signs("1990–2000") == ["-"]


@pytest.mark.parametrize("word", sorted(NEGATIONS))
def test_pairs_are_balanced_by_the_rule_that_measures(word):
    texts = [f"It is {word} so.", "It is so.", "It was so."]
    assert list(map(negated, texts)) == [True, False, False]
    assert RULES["contains_negation"](texts) == [1, 0, 0]


def test_negation():
    for text in ("It isn't so", "It isn\u2019t", "DON\u02bcT", "It does not.It does", "no.1"):
        assert negated(text), text
    for text in ("A knot in a note", "Nonetheless", "can t", "ant", ""):
        assert not negated(text), text
