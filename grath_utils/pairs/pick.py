"""Mode ``pick``: the model picks both answers from the source's options, not told which is right.

It separates *judging* from *writing*: a model too weak to write a true answer may still find one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from grath_utils import engine
from grath_utils.config import PROMPT_FORMATS
from grath_utils.pairs.default import clearest_pair, standardized
from grath_utils.pairs.judge import Case, find_judge
from grath_utils.pairs.parsing import Reason
from grath_utils.pairs.prompts import NEUTRAL_QUESTION, token_ids, training_prompt, training_request
from grath_utils.pairs.questions import Question
from grath_utils.pairs.writers import GRATH, Asked, PairMode, Rejected, Task, Writer, WrittenPair

if TYPE_CHECKING:
    import numpy as np


class PickingWriter(Writer):
    """Takes the options of most and of least credit.

    An option's credit is how much the question raises its log-probability (PMI, as in
    :mod:`.default`), summed, as training and tests sum, and standardised over the options; the
    mean over the two forms in which training prompts come. Nothing is shown beside the question.
    With a judge the credit is its probability instead. Later rounds pick the correct answer again,
    by the trained model's judgement.
    """

    def prompt_tokens(self, question: Question) -> int:
        tokenizer = self.policy.tokenizer
        prompts = [training_prompt(tokenizer, question, form) for form in PROMPT_FORMATS]
        if judge := find_judge(self.config):
            asked = [ask(question.text, question.candidates) for ask in judge.asks]
            prompts += [training_prompt(tokenizer, each) for each in asked]
        return max(len(token_ids(tokenizer, prompt)) for prompt in prompts)

    def write(self, tasks: Sequence[Task]) -> list[WrittenPair]:
        offered = [[c for c in task.question.candidates if c != task.incorrect] for task in tasks]
        texts = list(map(Task.judged, tasks, offered))
        judge = find_judge(self.config)
        asked = [Case(t.question.id, t.question.text, o) for t, o in zip(tasks, texts, strict=True)]
        credits = judge.weigh(self.policy, asked) if judge else self._credits(tasks, texts)
        written = []
        for task, options, credit in zip(tasks, offered, credits, strict=True):
            chosen = clearest_pair(task, options, credit, filters=self.filters, alike=False)
            if isinstance(chosen, Reason):
                chosen = WrittenPair(rejected=(Rejected("options", "\n".join(options), chosen),))
            elif judge:
                best = credit[task.judged(options).index(chosen.correct)]
                chosen = replace(chosen, truth=round(float(best), 4))
            written.append(chosen)
        return written

    def _credits(self, tasks: Sequence[Task], texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Return the credit of each task's texts, by their likelihood."""
        requests = [
            training_request(self.policy.tokenizer, question, text, form, item=task.question.id)
            for task, options in zip(tasks, texts, strict=True)
            for form in PROMPT_FORMATS
            for text in options
            for question in (task.question, NEUTRAL_QUESTION)
        ]
        scores = iter(engine.score_completions(self.policy, requests))
        credits = []
        for options in texts:
            credit = 0.0
            for _ in PROMPT_FORMATS:
                gains = [next(scores).logprob - next(scores).logprob for _ in options]
                credit += standardized(gains) / len(PROMPT_FORMATS)
            credits.append(credit)
        return credits


MODE = PairMode(
    name="pick",
    summary="the model picks both from the source's options, not told which is right",
    writer=PickingWriter,
    asked=lambda config, iteration: Asked(scored=4),  # ARC's four options, or their rotations
    origin="picked by the model from the source's options",
    card="Trained by DPO on answers that the model itself picked from given options as most and "
    f"least credible, without being told which is right: a control for {GRATH}, whose models "
    "write both themselves.",
    options=("judge",),
    needs_candidates=True,
)
