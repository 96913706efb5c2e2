"""The project's own data: schema, balance, no near duplicates, and no overlap with benchmarks.

The probe has its own tests in ``test_probe.py``; here it is only compared with the other files.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
from overlap import content_words, jaccard, mirror_questions, ngrams, words

from grath_utils.pairs.words import NEGATIONS

DATA = Path(__file__).resolve().parents[2] / "data"
FILES = ("questions", "retention", "demonstrations", "probe")
FIELDS = {
    "questions": {"id": str, "part": str, "topic": str, "question": str},
    "retention": {"id": str, "category": str, "question": str, "choices": list, "answer": int},
    "demonstrations": {"set": str, "question": str, "correct": str, "incorrect": str},
}
ID_PREFIX = {"questions": "own", "retention": "retention"}
MINIMUM = {"questions": 700, "retention": 160, "demonstrations": 12}

NEAR = 0.6  # content-word Jaccard from which two questions count as the same one
NGRAM = 8  # words in a row that betray copied wording
PUNCTUATION = "‘’“”–—…°"  # the only characters outside ASCII that may appear
HEDGES = {"may", "might", "maybe", "perhaps", "probably", "usually", "often", "sometimes", "some"}


# --- reading --------------------------------------------------------------------------------------


@cache
def load(name: str) -> tuple[dict, ...]:
    path = DATA / f"{name}.jsonl"
    if name == "probe" and not path.exists():
        pytest.skip("data/probe.jsonl is not there")
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def label(name: str, index: int) -> str:
    """Return what to look for in a file: the id of the row, or its line where it has none."""
    return load(name)[index].get("id", f"{name}.jsonl line {index + 1}")


def labelled(name: str) -> list[tuple[str, dict]]:
    return [(label(name, i), row) for i, row in enumerate(load(name))]


def texts(row: dict) -> list[str]:
    return [t for v in row.values() for t in (v if isinstance(v, list) else [v]) if type(t) is str]


# --- every file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_file_is_plain_jsonl(name):
    raw = (DATA / f"{name}.jsonl").read_bytes()
    assert not raw.startswith(b"\xef\xbb\xbf"), f"{name}.jsonl starts with a byte order mark"
    assert b"\r" not in raw, f"{name}.jsonl has Windows line ends"
    assert raw.endswith(b"\n"), f"{name}.jsonl does not end with a newline"
    lines = raw.decode("utf-8").split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        assert line == line.strip() != "", f"{name}.jsonl line {number}: blank or padded"


@pytest.mark.parametrize("name", FIELDS)
def test_schema(name):
    rows = labelled(name)
    assert len(rows) >= MINIMUM[name], f"{name}: {len(rows)} rows, at least {MINIMUM[name]} needed"
    for where, row in rows:
        assert list(row) == list(FIELDS[name]), f"{where}: fields are {list(row)}"
        for field, kind in FIELDS[name].items():
            assert type(row[field]) is kind, f"{where}: {field} is not a {kind.__name__}"


@pytest.mark.parametrize("name", ID_PREFIX)
def test_ids_count_up(name):
    for number, row in enumerate(load(name), start=1):
        expected = f"{ID_PREFIX[name]}-{number:03d}"
        assert row["id"] == expected, f"{row['id']}: {expected} was expected here"


@pytest.mark.parametrize("name", FIELDS)
def test_text_is_tidy(name):
    for where, row in labelled(name):
        for text in texts(row):
            assert text, f"{where}: an empty text"
            assert text == " ".join(text.split()), f"{where}: stray whitespace in {text!r}"
            odd = [c for c in text if not (" " <= c <= "~" or c in PUNCTUATION)]
            assert not odd, f"{where}: unexpected characters {odd} in {text!r}"
        question = row["question"]
        assert question.endswith("?"), f"{where}: the question does not end with '?'"
        assert question.count("?") == 1, f"{where}: more than one question"
        assert question[0].isupper(), f"{where}: the question starts in lower case"
        assert "of the following" not in question.lower(), f"{where}: refers to a list of options"
        assert "which of these" not in question.lower(), f"{where}: refers to a list of options"


@pytest.mark.parametrize("name", FIELDS)
def test_no_near_duplicates_within_a_file(name):
    for (where_a, a), (where_b, b) in combinations(labelled(name), 2):
        score = jaccard(a["question"], b["question"])
        assert score < NEAR, f"{where_a} and {where_b} are near duplicates (Jaccard {score:.2f})"


@pytest.mark.parametrize(("name_a", "name_b"), list(combinations(FILES, 2)))
def test_files_are_disjoint(name_a, name_b):
    for where_a, a in labelled(name_a):
        for where_b, b in labelled(name_b):
            score = jaccard(a["question"], b["question"])
            assert score < NEAR, f"{where_a} and {where_b}: Jaccard {score:.2f}"
            shared = ngrams(a["question"], NGRAM) & ngrams(b["question"], NGRAM)
            assert not shared, f"{where_a} and {where_b} share {shared}"


@pytest.mark.parametrize("name", FILES)
def test_datasheet_gives_the_right_count(name):
    count = len(load(name))
    datasheet = (DATA / "README.md").read_text(encoding="utf-8")
    start = f"| `{name}.jsonl` | {count} |"
    assert start in datasheet, f"data/README.md has no line that starts with {start!r}"


# --- questions ------------------------------------------------------------------------------------


def test_question_length():
    for where, row in labelled("questions"):
        count = len(row["question"].split())
        assert 6 <= count <= 25, f"{where}: {count} words, 6 to 25 are allowed"


def part(name: str) -> tuple[dict, ...]:
    """Return the rows of a file, or of one of the two parts of the questions."""
    rows = load("questions" if name in ("science", "everyday") else name)
    return [row for row in rows if row.get("part", name) == name] or rows


@pytest.mark.parametrize("name", ["science", "everyday"])
def test_topics_are_evenly_spread(name):
    rows = part(name)
    topics = Counter(row["topic"] for row in rows)
    assert 10 <= len(topics) <= 15, f"{len(topics)} topics"
    for topic, count in topics.items():
        share = len(rows) / len(topics)
        assert abs(count - share) <= 2, f"{topic}: {count} questions, about {share:.0f} expected"


def test_the_two_parts_of_the_questions_have_their_own_topics():
    science, everyday = ({row["topic"] for row in part(name)} for name in ("science", "everyday"))
    assert not science & everyday


@pytest.mark.parametrize(
    ("name", "field"), [("science", "topic"), ("everyday", "topic"), ("retention", "category")]
)
@pytest.mark.parametrize("size", [40, 60, 120])
def test_every_prefix_is_evenly_spread(name, field, size):
    kinds = {row[field] for row in part(name)}
    counts = Counter(row[field] for row in part(name)[:size])
    low, high = math.floor(size / len(kinds)), math.ceil(size / len(kinds))
    for kind in kinds:
        assert low <= counts[kind] <= high, f"first {size} of {name}: {counts[kind]} of {kind}"


def test_forms_are_varied():
    rows = load("questions")
    openings = Counter(tuple(words(row["question"])[:2]) for row in rows)
    for opening, count in openings.items():
        assert count <= 0.15 * len(rows), f"{count} questions start with {' '.join(opening)!r}"
    first = Counter(words(row["question"])[0] for row in rows)
    for word in ("what", "why", "how"):
        assert 0.1 * len(rows) <= first[word] <= 0.5 * len(rows), f"{first[word]} start with {word}"
    scenarios = sum(". " in row["question"] for row in rows)
    assert scenarios >= 0.05 * len(rows), f"only {scenarios} questions describe a scene first"


# --- retention ------------------------------------------------------------------------------------


def guess(scores: list[float], answer: int) -> tuple[float, float]:
    """Return how often picking the highest score hits ``answer``, and the variance by chance.

    Ties are broken by a fair draw. "By chance": the right answer is equally often any of the
    choices, so with k tied at the top a pick is worth 1/k in k of n cases.
    """
    best = [i for i, score in enumerate(scores) if math.isclose(score, max(scores), abs_tol=1e-9)]
    n, k = len(scores), len(best)
    return (1 / k if answer in best else 0.0), 1 / (n * k) - 1 / n**2


def mean_overlap(choices: list[str], i: int) -> float:
    """Return the mean Jaccard similarity of the words of choice ``i`` to the other choices."""
    bags = [set(words(choice)) for choice in choices]
    rest = [bag for j, bag in enumerate(bags) if j != i]
    return sum(len(bags[i] & bag) / len(bags[i] | bag) for bag in rest) / len(rest)


# Rules that never look at the meaning of the question: each scores the choices of one item.
RULES = {
    "longest": lambda q, cs: [len(c) for c in cs],
    "shortest": lambda q, cs: [-len(c) for c in cs],
    "most words": lambda q, cs: [len(words(c)) for c in cs],
    "odd one out": lambda q, cs: [-mean_overlap(cs, i) for i in range(len(cs))],
    "most typical": lambda q, cs: [mean_overlap(cs, i) for i in range(len(cs))],
    "shares words with the question": lambda q, cs: [
        len(content_words(c) & content_words(q)) for c in cs
    ],
    "first in the alphabet": lambda q, cs: [-sorted(cs).index(c) for c in cs],
    "contains a negation": lambda q, cs: [len(NEGATIONS & set(words(c))) for c in cs],
}


@pytest.mark.parametrize("rule", RULES)
def test_question_blind_rules_are_near_chance(rule):
    rows = load("retention")
    picks = [guess(RULES[rule](row["question"], row["choices"]), row["answer"]) for row in rows]
    accuracy = sum(hit for hit, _ in picks) / len(rows)
    margin = 1.96 * math.sqrt(sum(variance for _, variance in picks)) / len(rows)
    hits = [row["id"] for row, (hit, _) in zip(rows, picks, strict=True) if hit == 1]
    assert abs(accuracy - 0.25) <= margin + 1e-9, (
        f"{rule}: {accuracy:.1%}, chance is 25 % ± {margin:.1%}; it is right on {hits}"
    )


def test_choices():
    for where, row in labelled("retention"):
        choices = row["choices"]
        assert len(choices) == 4, f"{where}: {len(choices)} choices"
        assert 0 <= row["answer"] <= 3, f"{where}: answer {row['answer']}"
        folded = [choice.casefold() for choice in choices]
        assert len(set(folded)) == 4, f"{where}: a choice appears twice"
        for choice in choices:
            assert choice[0].isupper(), f"{where}: {choice!r} starts in lower case"
            assert choice[-1].isalnum(), f"{where}: {choice!r} ends with a punctuation mark"
            assert len(choice.split()) <= 4, f"{where}: {choice!r} is long for a short answer"
        spread = max(map(len, choices)) - min(map(len, choices))
        assert spread <= 10, f"{where}: the lengths of the choices differ by {spread} characters"


def test_answer_positions_are_balanced():
    rows = load("retention")
    for start in range(0, len(rows) - 3, 4):  # each four in a row use each position once
        block = rows[start : start + 4]
        positions = sorted(row["answer"] for row in block)
        assert positions == [0, 1, 2, 3], f"{block[0]['id']} to {block[-1]['id']}: {positions}"


def test_categories_are_evenly_spread():
    rows = load("retention")
    categories = Counter(row["category"] for row in rows)
    for category, count in categories.items():
        assert abs(count - len(rows) / len(categories)) <= 2, f"{category}: {count} items"


def test_no_answer_is_right_too_often():
    for text, count in Counter(r["choices"][r["answer"]] for r in load("retention")).items():
        assert count <= 4, f"{text!r} is the right answer of {count} items"


# --- demonstrations -------------------------------------------------------------------------------


def test_two_sets_of_six():
    sets = Counter(row["set"] for row in load("demonstrations"))
    assert sets == {"pair": 6, "single": 6}, f"sets are {dict(sets)}"


def test_demonstration_answers():
    for where, row in labelled("demonstrations"):
        counts = {}
        for side in ("correct", "incorrect"):
            text = row[side]
            counts[side] = len(text.split())
            assert 6 <= counts[side] <= 16, f"{where}: {side} answer has {counts[side]} words"
            assert text[0].isupper(), f"{where}: {side} answer starts in lower case"
            assert text.endswith("."), f"{where}: {side} answer is not a sentence"
            given_away = (NEGATIONS | HEDGES) & set(words(text))
            assert not given_away, f"{where}: {side} answer has {sorted(given_away)}"
        difference = abs(counts["correct"] - counts["incorrect"])
        assert difference <= 2, f"{where}: the answers differ by {difference} words"
        score = jaccard(row["correct"], row["incorrect"])
        assert score < 0.5, f"{where}: the answers are reworded copies (Jaccard {score:.2f})"


@pytest.mark.parametrize("name", ["pair", "single"])
def test_length_gives_no_hint(name):
    rows = [row for row in load("demonstrations") if row["set"] == name]
    longer = sum(len(row["correct"]) > len(row["incorrect"]) for row in rows)
    assert longer == len(rows) / 2, f"{name}: the correct answer is the longer one {longer} times"


# --- benchmarks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mirror() -> dict[str, list[str]]:
    root = os.environ.get("GRATH_MIRROR")
    if not root:
        pytest.skip("GRATH_MIRROR is not set: no benchmark to compare with")
    return mirror_questions(root)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "questions")) for name in FIELDS],
)
def test_no_benchmark_question_is_near(name, mirror):
    benchmark = [(kind, q, content_words(q)) for kind, qs in mirror.items() for q in qs]
    copied = {gram: q for _, q, _ in benchmark for gram in ngrams(q, NGRAM)}
    for where, row in labelled(name):
        question = row["question"]
        for gram in ngrams(question, NGRAM):
            assert gram not in copied, f"{where}: {' '.join(gram)!r} is also in {copied[gram]!r}"
        mine = content_words(question)
        for kind, other, theirs in benchmark:
            shared = len(mine & theirs)
            near = shared >= NEAR * len(mine | theirs) and shared > 0
            assert not near, f"{where} is near a {kind} question: {other!r}"
