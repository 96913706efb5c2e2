"""The mathematics of DPO (Rafailov et al., arXiv 2305.18290): log-probabilities and the loss.

:func:`dpo_loss` is the loss that trains: change it here, and training changes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def completion_log_probs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the summed log-probability of each sequence's completion, shape (2 B,), float32.

    ``log pi(y | x) = sum_t log pi(y_t | x, y_<t)``: summed, not averaged, as DPO's derivation has
    it. ``batch`` is that of :func:`.data.collate`.
    """
    ids, completion_mask = batch["input_ids"], batch["completion_mask"]
    first = int(completion_mask.argmax(dim=1).min())  # first completion token in any row
    logits = model(
        input_ids=ids,
        attention_mask=batch["attention_mask"],
        # A token is predicted one position earlier. Indices, not their number: for a number, torch
        # may copy the output head once for each row.
        logits_to_keep=torch.arange(first - 1, ids.shape[1] - 1, device=ids.device),
        use_cache=False,
    ).logits  # (2 B, T - first, V)
    log_probs = F.log_softmax(logits.float(), dim=-1)
    token_log_probs = log_probs.gather(2, ids[:, first:].unsqueeze(2)).squeeze(2)
    return (token_log_probs * completion_mask[:, first:]).sum(dim=1)


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float,
    *,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the DPO loss and the implicit rewards of each pair (equation 7 of the DPO paper).

    Args:
        policy_chosen_logps: summed log-probability of each chosen answer under the policy, shape
            (B,), like the other three.
        beta: strength of the pull to the reference, usually 0.01 to 0.5.
        label_smoothing: share of pairs whose labels are taken as flipped (cDPO); 0 is plain DPO.

    Returns:
        ``(losses, chosen_rewards, rejected_rewards)``, each of shape (B,), in nats; the rewards
        carry no gradient, and their difference is the margin. When policy = reference, every
        reward is 0 and every loss ln 2.
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    margins = beta * (chosen_logratios - rejected_logratios)  # log Z(x) cancels here
    losses = -F.logsigmoid(margins)
    if label_smoothing:
        losses = losses * (1 - label_smoothing) - F.logsigmoid(-margins) * label_smoothing
    # Equation 5, without log Z(x).
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()
