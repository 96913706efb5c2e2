"""Mode ``sentences``: as ``paper``, with demonstrations of our own, none from a benchmark.

Their answers are whole sentences that restate the question. A model that sees "The soot." as an
answer writes such scraps, and what it learns from them says little about sentences.
"""

from grath_utils.pairs.paper import MODE as PAPER
from grath_utils.pairs.paper import PaperWriter
from grath_utils.pairs.writers import PairMode


class SentencesWriter(PaperWriter):
    """One greedy completion for both answers, after the project's own demonstrations."""

    primer = ()


MODE = PairMode(
    name="sentences",
    summary="as `paper`, with demonstrations of our own, none from a benchmark",
    writer=SentencesWriter,
    asked=PAPER.asked,
    origin=PAPER.origin,
    card=PAPER.card,
    options=("self_check", "judge", "annotated"),
)
