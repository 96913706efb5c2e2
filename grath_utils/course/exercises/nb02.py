"""Notebook 02: the loss, the sums that it gets, and a loss that holds the chosen answer up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from grath_utils.course.exercises.judging import Answer, exercise, hold, hold_wanted
from grath_utils.dpo.loss import dpo_loss

CASES = 20  # random ones, the same for everybody
SLACK = 1e-4  # absolute and relative: float32


def hold_tensor(mine: Any, wanted: torch.Tensor) -> torch.Tensor:
    """Return a result, if it is a tensor with a finite number for each row."""
    hold(isinstance(mine, torch.Tensor), f"a tensor is wanted, not {type(mine).__name__}.")
    hold(
        mine.shape == wanted.shape,
        f"{len(wanted)} numbers are wanted, in shape {tuple(wanted.shape)}; yours has shape "
        f"{tuple(mine.shape)}.",
    )
    hold(bool(mine.isfinite().all()), "a result is not finite. See the hint.")
    return mine.detach().double()


@exercise("02.easy", "your function, called with four tensors and beta")
def own_loss(answer: Answer) -> str:
    function, draw = answer.function(), torch.Generator().manual_seed(0)
    for case in range(CASES):
        scale = 1000 if case % 4 == 3 else 5
        four = torch.randn(4, 6, generator=draw, dtype=torch.float64) * scale - 40
        beta = 0.05 + float(torch.rand((), generator=draw))
        wanted, turned = (dpo_loss(*sides, beta)[0] for sides in (four, four[[1, 0, 3, 2]]))
        mine = hold_tensor(function(*four, beta), wanted)
        hold_wanted(
            mine,
            wanted,
            SLACK,
            (turned, "this is the loss of preferring the rejected answer."),
            (dpo_loss(*four, 1.0)[0], "beta is missing."),
            (-wanted, "a loss is never negative: mind the sign in front of the logarithm."),
            (dpo_loss(*four[:2], *torch.zeros(2, 6), beta)[0], "the reference is missing."),
            relative=SLACK,
            otherwise=f"for beta {beta:.2f} these are other losses.",
        )
    return "these are the losses that train, far below a margin of 0 as well."


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield logits, ids, mask, and the summed log-probabilities, of random batches."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(CASES):
        rows, length, vocabulary = 3, 9, 11
        logits = torch.randn(rows, length, vocabulary, generator=draw, dtype=torch.float64) * 3
        ids = torch.randint(vocabulary, (rows, length), generator=draw)
        begin = torch.randint(1, 5, (rows, 1), generator=draw)
        end = torch.randint(6, length + 1, (rows, 1), generator=draw)  # padding follows
        places = torch.arange(length)
        mask = ((places >= begin) & (places < end)).long()
        yield logits, ids, mask, summed(logits[:, :-1].log_softmax(-1), ids[:, 1:], mask[:, 1:])


def summed(values: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the sum over the mask of what a row has for its tokens."""
    return (values.gather(2, ids[:, :, None])[:, :, 0] * mask).sum(dim=1)


@exercise("02.medium", "your function, called with logits, ids and mask")
def own_sums(answer: Answer) -> str:
    function = answer.function()
    for logits, ids, mask, wanted in batches():
        mine = hold_tensor(function(logits, ids, mask), wanted)
        log_p = logits.log_softmax(-1)
        hold_wanted(
            mine,
            wanted,
            SLACK,
            (summed(log_p, ids, mask), "the logits at a place are about the *next* token."),
            (wanted / mask.sum(dim=1), "DPO wants the sum, not the mean."),
            (summed(log_p[:, :-1], ids[:, 1:], torch.ones_like(ids[:, 1:])),
             "tokens outside the mask are counted as well."),
            (summed(log_p[:, :-1], ids[:, 1:], mask[:, :-1]), "the mask is off by one place."),
            (summed(logits[:, :-1], ids[:, 1:], mask[:, 1:]),
             "logits are no log-probabilities yet: what do they sum to?"),
            relative=SLACK,
            otherwise="these are other sums.",
        )  # fmt: skip
    return "the same sums as the library's, without a look at prompt or padding."


@exercise("02.hard", "your function, called as dpo_loss is")
def positive_loss(answer: Answer) -> str:
    function = answer.function()
    beta = 0.1
    chosen, rejected = torch.tensor([-20.0]), torch.tensor([-24.0])

    def both(up: float, down: float) -> tuple[float, float]:
        four = (chosen + up, rejected + down, chosen, rejected)
        return float(function(*four, beta)), dpo_loss(*four, beta)[0].item()

    for up, down in ((0.0, 0.0), (5.0, 0.0), (0.0, -5.0), (0.0, 3.0)):
        ours, plain = both(up, down)
        hold(
            abs(ours - plain) < 1e-4,
            "where the chosen answer has not fallen, the loss must be DPO's own.",
        )
    (fell, plain), (fell_more, _) = both(-1.0, -5.0), both(-2.0, -6.0)
    hold(fell > plain + 1e-4, "a fallen chosen answer costs nothing extra yet.")
    hold(fell_more > fell + 1e-4, "falling further has to cost more.")
    moves = [both(*move)[0] for move in ((5.0, 0.0), (0.0, -5.0), (-5.0, -15.0))]
    hold(
        moves[2] == max(moves),
        "pushing both down is still not the worst of the three moves: weigh the new term more.",
    )
    moving = (chosen - 3.0).requires_grad_()
    slope = torch.autograd.grad(function(moving, rejected, chosen, rejected, beta).sum(), moving)[0]
    hold(slope.item() < 0, "the gradient does not pull a fallen chosen answer up again.")
    return "it is DPO where nothing is lost, and no longer won by pushing both answers down."
