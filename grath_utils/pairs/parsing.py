"""From a completion to a pair of answers, and the filters that a pair has to pass.

Every completion that does not become a pair gets one reason of a closed set, :class:`Reason`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import StrEnum
from unicodedata import normalize

from grath_utils.files import is_text
from grath_utils.pairs.prompts import Labels
from grath_utils.pairs.words import (
    content_words,
    is_blank,
    length_ratio,
    negated,
    same_wording,
    signs,
    split_words,
)


class Reason(StrEnum):
    """Why a completion was rejected."""

    NO_CORRECT = "no_correct"  # no label announces a correct answer
    NO_INCORRECT = "no_incorrect"  # no label announces an incorrect answer
    CUT_OFF = "cut_off"  # the token limit was reached before the last answer ended
    EMPTY = "empty"  # an answer has no word in it
    EQUAL = "equal"  # the answers are the same but for case, punctuation and articles
    NEAR_EQUAL = "near_equal"  # they differ in next to nothing: no number, sign or negation
    QUESTION_COPY = "question_copy"  # an answer repeats the question, or most of it and no more
    OTHER_QUESTION = "other_question"  # another question is restated, or a demonstration's answer
    LENGTH_RATIO = "length_ratio"  # one answer is far longer: length would tell them apart
    NON_ANSWER = "non_answer"  # an answer refuses, talks about the task, or is broken text
    REPETITION = "repetition"  # an answer turns in circles: the same words three times in a row
    SELF_CHECK = "self_check"  # the model itself finds the incorrect answer more probable
    UNDECIDED = "undecided"  # the judge cannot tell which of the two is true
    JUDGED_FALSE = "judged_false"  # refinement: the judge finds the incorrect answer to be the true
    NO_SEALED_ANSWER = "no_sealed_answer"  # labels `annotated`: of this question none is known
    TOO_LONG = "too_long"  # the question does not fit into the context; nothing was generated


@dataclass(frozen=True)
class Parsed:
    """The fields found in a completion; a field that was not found is None."""

    correct: str | None = None
    incorrect: str | None = None
    question: str | None = None  # the question as the completion restates it
    cut_off: bool = False  # the token limit came before the end of the last field

    @property
    def reason(self) -> Reason | None:
        """Why this is no pair, or None if both fields were found."""
        if self.correct is None:
            return Reason.NO_CORRECT
        return Reason.NO_INCORRECT if self.incorrect is None else None

    @property
    def sides(self) -> tuple[str, str]:
        """Both answers as text."""
        return self.correct or "", self.incorrect or ""

    @property
    def words(self) -> list[list[str]]:
        """The words of both answers."""
        return list(map(split_words, self.sides))


# A label opens a line, after numbering, bullets, quotes or emphasis; or follows a sentence on the
# same line. `Answer` may be missing ("Incorrect: ...") but the colon may not: prose has the words
# as well. Emphasis may close before or after the colon ("**Correct answer:**", "**Correct**:").
_LABEL = re.compile(
    r"""(?: (?:^|(?<=[\n.!?;"'”’])) [ \t]* (?:[-*•>#]+[ \t]*)? (?:\(?[0-9a-zA-Z][.)][ \t]*)? )
        [*_"'“‘`]{0,3}
        (?: (?:the|a|an|one|my|your)[ ] )?
        (?: (?P<incorrect> incorrect | wrong | false ) | (?P<correct> correct | right | true )
                | (?P<question> question ) | explanation | reason | note )
        (?: [ ]+ (?:answers?|response|statement|option) )?
        (?: [ ]? [#]?[0-9]{1,2} | [ ]is )?
        [*_"'”’`]{0,3} [ \t]* [:：] [*_"'”’`]{0,3}
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_QUOTES = "\"'“”‘’`*_"


def parse_pair(completion: str) -> Parsed:
    """Read the fields of a completion, whatever their order; never raises.

    Each field is the first line after its label that is not blank. Where a label comes twice the
    first counts. Nothing before the first label is part of an answer, nor is an explanation after.
    """
    text = completion.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " ")
    labels = list(_LABEL.finditer(text))
    ends = [label.start() for label in labels[1:]] + [len(text)]
    fields: dict[str, str] = {}
    for label, end in zip(labels, ends, strict=False):
        if label.lastgroup:  # an explanation is no field, but it ends the one before
            fields.setdefault(label.lastgroup, first_line(text[label.end() : end]))
    return Parsed(**fields)


def first_line(text: str) -> str:
    """Return the first line that is not blank, cleaned; nothing if there is none."""
    return clean(next((line for line in text.split("\n") if not is_blank(line)), ""))


def clean(answer: str) -> str:
    """Return an answer without the blanks, quotes and emphasis around it."""
    text = " ".join(answer.split())
    while len(text) > 1 and text[0] in _QUOTES and text[-1] in _QUOTES:
        text = text[1:-1].strip()
    # Emphasis or a quotation mark that has no partner is a leftover, an apostrophe is not.
    for mark in '"*`':
        if text.count(mark) == 1 and (text.startswith(mark) or text.endswith(mark)):
            text = text.strip(mark).strip()
    return text


def parse_legacy(completion: str) -> Parsed:
    """Read a completion as the official code does, quirks included (for comparison only).

    Exactly one incorrect label is needed; without a correct label everything before counts as the
    correct answer; later lines are glued on without a space.
    """
    parts = completion.split(f"{Labels.incorrect} ")
    if len(parts) != 2:
        return Parsed("", None)
    before = parts[0].split(f"{Labels.correct} ")[-1]
    return Parsed(*(part.replace("\n", "").strip() for part in (before, parts[1])))


def pair_is_complete(text: str) -> bool:
    """Return True if generation may stop: both fields are there and the last line has ended."""
    parsed = parse_pair(text.rpartition("\n")[0])
    return bool(parsed.correct and parsed.incorrect)


NEAR_EQUAL_RATIO = 0.9
MAX_LENGTH_RATIO = 4.0  # in characters, see words.length_ratio
OTHER_QUESTION_RATIO = 0.3
ECHO_SHARE = 0.6
# The same run of one to eight words, three times in a row ("is the answer is the answer is ...").
_REPETITION = re.compile(r"\b(\w+(?:\W+\w+){0,7})(?:\W+\1\b){2}", re.IGNORECASE)
_NON_ANSWER = re.compile(
    r"""^(?: (?:i['’]m|i[ ]am)[ ](?:sorry|unable|not[ ]able)
           | i[ ](?:can(?:no|['’])t|do(?:n['’]t|[ ]not)[ ](?:know|have)|have[ ]no[ ]comment)
           | sorry\b | as[ ]an?[ ]ai\b | n/?a$ | none$ | unknown$ | \?+$
           | (?:both|either|neither)[ ](?:answers?|of[ ](?:these|them|the[ ]above))
           | (?:all|none)[ ]of[ ](?:the[ ]above|these|them)
           | (?:an?|the|this)?[ ]?(?:in)?correct[ ]answer\b
           | \[.*\]$ | <.*>$
           | (?s:.)*[\0\ufffd\ud800-\udfff] )""",  # bytes that make up no character
    re.VERBOSE | re.IGNORECASE,
)


def near_equal(a: str, b: str) -> bool:
    """Return True if two answers say the same in nearly the same letters.

    A differing number, sign or negation is never near: it is the whole difference between them.
    """
    left, right = split_words(a), split_words(b)
    digits = [[w for w in side if any(map(str.isdigit, w))] for side in (left, right)]
    # One word in place of another is a difference in meaning; an ending ("cells", "cell") is not.
    extra = set(left) - set(right), set(right) - set(left)
    roots = [{word[:4] for word in words} for words in extra]
    if max(len(a), len(b)) <= 1000:
        matcher = SequenceMatcher(None, " ".join(left), " ".join(right), autojunk=False)
    else:  # letter by letter would take minutes
        matcher = SequenceMatcher(None, left, right)
    return (
        digits[0] == digits[1]
        and signs(a) == signs(b)
        and negated(a) == negated(b)
        and roots[0] == roots[1]
        and (bool(extra[0]) or sorted(left) == sorted(right))
        and matcher.ratio() >= NEAR_EQUAL_RATIO
    )


def echoes(question: str, answer: str) -> bool:
    """Return True if an answer holds no word of its own, and most words of the question.

    A choice out of the question ("the Sun") is an answer.
    """
    asked, said = content_words(question), content_words(answer)
    return said <= asked and len(said) >= ECHO_SHARE * len(asked)


def _other_question(asked: str, restated: str | None) -> bool:
    """Return True if a restated question shares too few words with the one that was asked."""
    left, right = set(split_words(asked)), set(split_words(restated or ""))
    return len(left & right) < OTHER_QUESTION_RATIO * min(len(left), len(right))


FILTERS: dict[Reason, Callable[[str, Parsed, list[list[str]]], bool]] = {
    Reason.CUT_OFF: lambda asked, pair, shown: pair.cut_off,
    Reason.EMPTY: lambda asked, pair, shown: not all(pair.words),
    Reason.EQUAL: lambda asked, pair, shown: same_wording(*pair.sides),
    Reason.NEAR_EQUAL: lambda asked, pair, shown: near_equal(*pair.sides),
    Reason.QUESTION_COPY: lambda asked, pair, shown: any(echoes(asked, a) for a in pair.sides),
    Reason.OTHER_QUESTION: lambda asked, pair, shown: (
        _other_question(asked, pair.question) or any(words in shown for words in pair.words)
    ),
    Reason.LENGTH_RATIO: lambda asked, pair, shown: length_ratio(*pair.sides) > MAX_LENGTH_RATIO,
    Reason.NON_ANSWER: lambda asked, pair, shown: any(map(_NON_ANSWER.match, pair.sides)),
    Reason.REPETITION: lambda asked, pair, shown: any(map(_REPETITION.search, pair.sides)),
}
"""The filters that can be switched, in the order in which they are applied: each gets the question,
the pair, and the words of each answer that was shown."""


def check_pair(
    question: str,
    parsed: Parsed,
    *,
    filters: Collection[str] = tuple(FILTERS),
    shown_answers: Iterable[str] = (),
) -> Reason | None:
    """Return why a parsed pair is rejected, or None if it passes.

    A missing field is always a reason, and so is what :func:`unusable` says. ``shown_answers`` are
    those of the demonstrations: a copy of one answers another question.
    """
    if parsed.reason is not None:
        return parsed.reason
    shown = [split_words(answer) for answer in shown_answers]
    active = (name for name in FILTERS if name in filters)
    found = next((name for name in active if FILTERS[name](question, parsed, shown)), None)
    return found or unusable(*parsed.sides)


def unusable(*answers: str) -> Reason | None:
    """Return why texts cannot be the answers of a pair, whatever the filters, or None if they can.

    So that nothing is written that :func:`.read_pairs` would refuse.
    """
    if any(map(is_blank, answers)):
        return Reason.EMPTY
    if not all(map(is_text, answers)):
        return Reason.NON_ANSWER
    different = {" ".join(normalize("NFC", answer).split()) for answer in answers}
    return Reason.EQUAL if len(different) < len(answers) else None


def check_answer(
    question: str,
    answer: str,
    *,
    cut_off: bool = False,
    filters: Collection[str] = tuple(FILTERS),
    shown_answers: Iterable[str] = (),
) -> Reason | None:
    """Return why one answer alone cannot be a side of a pair, or None if it can."""
    single = set(filters) - {Reason.EQUAL, Reason.NEAR_EQUAL, Reason.LENGTH_RATIO}
    twice = Parsed(answer, answer, cut_off=cut_off)
    reason = check_pair(question, twice, filters=single, shown_answers=shown_answers)
    return None if reason is Reason.EQUAL else reason
