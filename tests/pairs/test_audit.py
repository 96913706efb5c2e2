"""The audit: each number on pairs where it is known."""

from __future__ import annotations

import numpy as np
import pytest

from grath_utils.errors import DataError
from grath_utils.pairs.audit import (
    audit_pairs,
    distinct_share,
    embed,
    embedding_distance,
    wilson,
    word_divergence,
)
from grath_utils.pairs.generate import Pair
from grath_utils.pairs.questions import Question
from grath_utils.pairs.words import length_ratio, ngram_f1, word_f1

QUESTIONS = [
    Question("a", "What pumps blood?", ("the heart", "the liver"), 0),
    Question("b", "What is ice?", ("a kind of stone", "frozen water"), 1),
    Question("c", "What is fire?", ("hot gas", "a metal"), 0),
    Question("d", "Who knows?"),
    Question("e", "Not answered?", ("yes", "no"), 0),
]
PAIRS = [
    Pair("a", "What pumps blood?", "The heart pumps it.", "The liver does not."),
    Pair("b", "What is ice?", "A stone that melts.", "It is frozen water, of course."),
    Pair("c", "What is fire?", "A spirit.", "A river."),
    Pair("d", "Who knows?", "a spirit", "Nobody at all."),
]


def test_audit_counts():
    audit = audit_pairs(PAIRS, QUESTIONS)
    gold = audit.gold
    assert (gold.judged, gold.nearer, gold.tied, gold.farther) == (3, 1, 1, 1)
    assert gold.decided_interval == wilson(1, 2)
    assert audit.usable == 0.8
    # Words without articles: 3, 3, 1, 1 against 3, 6, 1, 3.
    assert audit.correct_words == 2.0
    assert audit.incorrect_words == 3.25
    assert audit.distinct_correct == 0.5  # "A spirit." comes twice
    assert audit.distinct_incorrect == 1.0
    assert 0 < audit.divergence <= 1
    assert audit_pairs(PAIRS[2:3], QUESTIONS).gold.decided_interval == (0, 1)  # one pair, tied


def test_audit_refuses_what_does_not_belong_together():
    with pytest.raises(DataError, match="no pairs"):
        audit_pairs([], QUESTIONS)
    with pytest.raises(DataError, match='"d" belongs to none'):
        audit_pairs(PAIRS, QUESTIONS[:3])


def test_wilson_interval():
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def test_word_f1_does_not_favour_short_answers():
    gold = "frozen water"
    assert word_f1("frozen water", gold) == 1.0
    assert word_f1("It is frozen.", gold) == pytest.approx(2 / 3)
    assert word_f1("It is.", gold) == 0.0
    assert word_f1("", gold) == word_f1(gold, "") == 0.0
    assert word_f1("waters freezing", "water freezes") == 1.0


def test_ngram_f1():
    assert ngram_f1("The heart.", "the  heart") == 1.0
    assert ngram_f1("abc", "xyz") == 0.0
    assert ngram_f1("", "xyz") == 0.0
    # Letters: 2·3/8; pairs of letters: 2·2/6; of three: 2·1/4; of four: none of 1 in common.
    assert ngram_f1("abcd", "abce") == pytest.approx((6 / 8 + 4 / 6 + 2 / 4 + 0) / 4)


def test_length_ratio_is_lenient_with_short_answers():
    assert length_ratio("Yes.", "No.") < 1.1
    assert length_ratio("x" * 88, "x" * 38) == 2.0
    assert length_ratio("ab", "abcd") == length_ratio("abcd", "ab")


def test_distinct_share():
    assert distinct_share(["A b.", "a B", "c"]) == pytest.approx(1 / 3)
    assert distinct_share(["C++", "C#", "caf\u00e9", "cafe\u0301"]) == 0.5


def test_word_divergence_has_known_ends():
    assert word_divergence(["one two"], ["two one"]) == pytest.approx(0.0)
    assert word_divergence(["one two"], ["three four"]) == pytest.approx(1.0)
    # p = (1/2, 1/2, 0), q = (1/2, 0, 1/2): half of the mass differs wholly.
    assert word_divergence(["one two"], ["one three"]) == pytest.approx(0.5)
    assert word_divergence([], ["one"]) == 1.0
    assert word_divergence([], []) == 0.0


def test_embedding_distance():
    draw = np.random.default_rng(0)
    left, right = draw.normal(size=(400, 8)), draw.normal(size=(400, 8))
    assert embedding_distance(left, left) == 0.0
    assert embedding_distance(left, right) < 0.15
    shifted = embedding_distance(left, right + 3.0)
    assert shifted == pytest.approx(3.0, rel=0.05)
    assert embedding_distance(10 * left, 10 * (right + 3.0)) == pytest.approx(shifted)


def test_embeddings_do_not_depend_on_the_batch(tiny_policy):
    texts = ["why", "the thing in the end of it all", "x", "who is there?"]
    together = embed(tiny_policy, texts, batch_size=4)
    alone = np.concatenate([embed(tiny_policy, [text]) for text in texts])
    assert together.shape == (4, 64)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.ptp(together, axis=0).max() > 0.01
