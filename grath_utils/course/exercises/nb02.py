"""Notebook 02: beta, the levels of NF4, and a loss that holds the chosen answer up."""

from __future__ import annotations

from typing import Any

import torch

from grath_utils.course.exercises.judging import base_model, exercise, finite_numbers, hold, near
from grath_utils.dpo.loss import dpo_loss
from grath_utils.engine.models import Policy
from grath_utils.loop.run_dir import Run


@exercise("02.easy", "three rises in nats, for beta 0.01, 0.1 and 1")
def beta_rises(run: Run, answer: Any, policy: Policy | None) -> str:
    betas, goal = (0.01, 0.1, 1.0), 0.1
    found = finite_numbers(answer, len(betas))
    hold(all(value > 0 for value in found), "the chosen log-probability has to rise.")
    zero = torch.zeros(1, dtype=torch.float64)
    for beta, rise in zip(betas, found, strict=True):
        loss = dpo_loss(zero + rise, zero, zero, zero, beta)[0].item()
        hold(
            loss < goal * 1.1,
            f"for beta {beta:g} the loss is still {loss:.3f} after that rise. Is the range that "
            "you look at long enough?",
        )
        hold(loss > goal * 0.9, f"for beta {beta:g} the loss is below {goal} earlier than you say.")
    return "now read the three as one rule: how does the rise depend on beta?"


@exercise("02.medium", "(error of NF4, error of even levels), as fractions")
def level_errors(run: Run, answer: Any, policy: Policy | None) -> str:
    from bitsandbytes.functional import get_4bit_type

    found = finite_numbers(answer, 2)
    weight = base_model(run, policy).model.get_input_embeddings().weight.detach().float().cpu()
    blocks = weight[:64].reshape(-1, 64)
    scales = blocks.abs().max(dim=1, keepdim=True).values
    whole, by_block = [], []
    for levels in (get_4bit_type("nf4", device="cpu"), torch.linspace(-1, 1, 16)):
        codes = ((blocks / scales).unsqueeze(2) - levels).abs().argmin(dim=2)
        off = levels[codes] * scales - blocks
        whole.append((off.norm() / blocks.norm()).item())
        by_block.append((off.norm(dim=1) / blocks.norm(dim=1)).mean().item())
    hold(max(found) < 1, "give fractions, not percent.")
    hold(
        not any(near(found[::-1], w, 0.003) for w in (whole, by_block)),
        "these are the two numbers, in the other order: NF4 first.",
    )
    hold(
        any(near(found, w, 0.003) for w in (whole, by_block)),
        "at least one error is another one. Same blocks, same scales (the largest absolute value "
        "of each block), the nearest level; error relative to the weights' norm.",
    )
    return f"NF4's error is {1 - found[0] / found[1]:.0%} smaller on these weights."


@exercise("02.hard", "your function, called as dpo_loss is")
def positive_loss(run: Run, answer: Any, policy: Policy | None) -> str:
    hold(callable(answer), "hand in the function itself, without calling it.")
    beta = 0.1
    chosen, rejected = torch.tensor([-20.0]), torch.tensor([-24.0])

    def both(up: float, down: float) -> tuple[float, float]:
        four = (chosen + up, rejected + down, chosen, rejected)
        return float(answer(*four, beta)), dpo_loss(*four, beta)[0].item()

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
    slope = torch.autograd.grad(answer(moving, rejected, chosen, rejected, beta).sum(), moving)[0]
    hold(slope.item() < 0, "the gradient does not pull a fallen chosen answer up again.")
    return "it is DPO where nothing is lost, and no longer won by pushing both answers down."
