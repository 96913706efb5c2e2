"""What tests of DPO share: a short round on a tiny model, its tokens, what TensorBoard reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from helpers import DPO, LORA, PAIRS

from grath_utils.config import ModelConfig
from grath_utils.dpo.adapters import add_adapter
from grath_utils.dpo.data import PreferenceExample, tokenize_pairs
from grath_utils.dpo.round import TrainingReport, train_round
from grath_utils.engine.models import Policy, load_base

LIMITS = {"max_prompt_length": 200, "max_length": 300}
TRAINED, HELD_OUT = PAIRS[:4], PAIRS[4:]


def one_round(
    base: ModelConfig, folder: Path, previous: Path | None = None, *, seed: int = 0, **changes
) -> TrainingReport:
    """Train four pairs for four steps, or with other settings of ``dpo``."""
    settings = {"dpo": replace(DPO, **changes), "lora": LORA, "progress": False}
    return train_round(base, TRAINED, HELD_OUT, folder, seed=seed, previous=previous, **settings)


def tokens(policy: Policy) -> tuple[PreferenceExample, ...]:
    return tokenize_pairs(policy.tokenizer, PAIRS, **LIMITS).examples


def moved_policy(base: ModelConfig) -> Policy:
    """Return the base with an adapter that changes it, as after some training."""
    policy = add_adapter(load_base(base), LORA, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return policy


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return ``{tag: [(step, value), ...]}`` of the event files in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
