"""How far training has moved a policy: its divergence from the base model, token by token.

DPO's objective is a reward less ``beta KL(policy || reference)``, which its loss never computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from grath_utils.dpo.data import PreferenceExample
from grath_utils.engine.attention import row_attention
from grath_utils.engine.models import Policy, accepts, base_of
from grath_utils.engine.packing import pack, row_limit
from grath_utils.engine.scoring import LOGIT_ROWS, row_logits
from grath_utils.errors import UsageError


@torch.inference_mode()
def kl_per_token(
    policy: Policy, examples: Sequence[PreferenceExample], base: Policy | None = None
) -> list[float]:
    """Return KL(policy || base) of each pair, averaged over its answers' tokens, in nats.

    The divergence of the two next-token distributions is exact at each place. What is sampled is
    where to look: in the pairs' answers, chosen and rejected, best of questions held out. Without
    ``base`` it is the policy without its adapters (:func:`.models.base_of`): one model in memory.
    """
    if not examples:
        raise UsageError("there are no pairs to measure the drift on")
    longest = max(example.length for example in examples)
    row_tokens = min(row_limit(model, longest) for model in (policy, base or policy))
    total, count = np.zeros(len(examples)), np.zeros(len(examples))
    shared = row_tokens > 0
    for row in pack([vars(e) for e in examples], row_tokens):
        logits = [_logits(policy, row, shared)]
        with base_of(policy, base) as other:
            logits.append(_logits(other, row, shared))
        parts = zip(*(values.split(LOGIT_ROWS) for values in logits), strict=True)
        kl = np.concatenate([_kl(p, q) for p, q in parts])  # (P,)
        at = row["sequence"].numpy() % len(examples)  # chosen and rejected of a pair together
        np.add.at(total, at, kl[row["which"].numpy()])
        np.add.at(count, at, 1)
    return (total / count).tolist()


def _logits(policy: Policy, row: dict[str, torch.Tensor], shared: bool) -> torch.Tensor:
    here = {name: tensor.to(policy.device) for name, tensor in row.items()}
    dtype = policy.model.get_input_embeddings().weight.dtype
    selects = accepts(policy.model, "logits_to_keep")
    with row_attention(policy.model, shared=shared):
        return row_logits(policy.model, here, dtype, selects=selects)


def _kl(policy: torch.Tensor, base: torch.Tensor) -> np.ndarray:
    """Return KL(policy || base) of each row of logits, in float64."""
    log_p, log_q = policy.float().log_softmax(-1), base.float().log_softmax(-1).to(policy.device)
    return (log_p.exp() * (log_p - log_q)).sum(-1).cpu().numpy().astype(np.float64)
