"""Mode ``sentences``: as ``paper``, with demonstrations of our own, none from a benchmark.

Their answers are whole sentences that restate the question. A model that sees "The soot." as an
answer writes such scraps, and what it learns from them says little about sentences.
"""

from dataclasses import replace

from grath_utils.pairs.paper import MODE as PAPER
from grath_utils.pairs.paper import PaperWriter


class SentencesWriter(PaperWriter):
    """One greedy completion for both answers, after the project's own demonstrations."""

    primer = ()


MODE = replace(
    PAPER,
    name="sentences",
    summary="as `paper`, with demonstrations of our own, none from a benchmark",
    writer=SentencesWriter,
    options=("self_check", "judge", "annotated"),
    prompt_overlap="",
)
