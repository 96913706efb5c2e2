"""LoRA adapters: a base with adapters on it, a new adapter, and how one is saved."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import set_seed

from grath_utils.config import LoraConfig, ModelConfig
from grath_utils.engine.machine import quiet_transformers
from grath_utils.engine.models import (
    ADAPTER_RECORD,
    TOP,
    Policy,
    activate_adapters,
    adapter_fingerprint,
    apply_adapters,
    base_weights_fingerprint,
    load_base,
    merged_before,
)
from grath_utils.errors import TrainingError
from grath_utils.files import atomic_path, fingerprint, write_json


@dataclass(frozen=True)
class Weights:
    """A set of weights by recipe: a base model and the adapters on it, in order."""

    base: ModelConfig
    adapters: tuple[Path, ...] = ()

    def load(self, *, fold_last: bool = False) -> Policy:
        """Load them, with all adapters but the last folded in, and the last on top if wanted."""
        policy = load_base(self.base)
        if not self.adapters:
            return policy
        return apply_adapters(policy, list(self.adapters), fold_last=fold_last)

    def fingerprint(self) -> str:
        """Identify the weights without loading them."""
        base = [base_weights_fingerprint(self.base), self.base.quantization, self.base.dtype]
        return fingerprint([base, [adapter_fingerprint(path) for path in self.adapters]])


def model_after(base: ModelConfig, adapter: Path | None) -> Weights:
    """Return the weights of the model after a round (``None``: before the first)."""
    return Weights(base, (*merged_before(adapter), adapter) if adapter else ())


def add_adapter(policy: Policy, lora: LoraConfig, seed: int) -> Policy:
    """Put a new LoRA adapter on the policy; its B matrices are 0, so nothing changes yet.

    Raises:
        TrainingError: a target name matches no linear layer; the names that exist are listed.
    """
    import peft

    model = policy.model
    targets = "all-linear" if lora.targets == ("all-linear",) else list(lora.targets)
    layers = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if hasattr(m, "in_features")}
    missing = [] if targets == "all-linear" else [n for n in targets if n not in layers]
    if missing:
        raise TrainingError(
            f"lora.targets names layers that this model does not have: {', '.join(missing)}; "
            f"its linear layers are {', '.join(sorted(layers - {'lm_head'}))}, "
            "or say [all-linear]"
        )
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
    )
    set_seed(seed)  # LoRA's A matrices are drawn here
    with quiet_transformers():
        if hasattr(model, "peft_config"):  # beside the folded adapters of a quantized model
            model.add_adapter(TOP, settings)
        else:
            model = peft.get_peft_model(model, settings)
        activate_adapters(model, trainable=True)
    return replace(policy, model=model)


def full_adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained weights by name; every process calls it where FSDP has split them."""
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in trained.items()}


def save_adapter(
    policy: Policy,
    weights: dict[str, torch.Tensor],
    folder: Path,
    *,
    base: ModelConfig,
    merged: Sequence[Path],
) -> None:
    """Save the adapter with a record of the base it belongs to and of what was merged before."""
    with atomic_path(folder) as partial, quiet_transformers():
        settings = policy.model.peft_config[TOP]
        settings.base_model_name_or_path = base.name  # a name, not this machine's cache path
        # A set is written in another order by each process; equal adapters should be equal files.
        settings.target_modules = sorted(settings.target_modules)
        # Never the embeddings: they are not trained, and peft would ask the Hub about them.
        policy.model.save_pretrained(
            partial, selected_adapters=[TOP], state_dict=weights, save_embedding_layers=False
        )
        (partial / "README.md").unlink(missing_ok=True)  # peft's empty model card
        record = {
            "base": base.name,
            "base_weights": base_weights_fingerprint(base),
            "model": {**dataclasses.asdict(base), "device": "auto"},
            "merged": [Path(os.path.relpath(path, folder)).as_posix() for path in merged],
        }
        write_json(partial / ADAPTER_RECORD, record)


def refuse_cpu_4bit(model: torch.nn.Module) -> None:
    """Raise TrainingError for a 4-bit layer on a CPU, which is repacked when it runs inference.

    Its backward pass then gives no gradient to the layers below it; PyTorch only warns.
    """
    for name, module in model.named_modules():
        four_bit = type(module).__name__ in ("Linear4bit", "LinearFP4", "LinearNF4")
        if four_bit and next(module.parameters()).device.type == "cpu":
            raise TrainingError(
                f"{name} is a bitsandbytes 4-bit layer on a CPU: after one inference pass it "
                "gives no gradient, and training would silently do nothing below it. Load the "
                "model with model.quantization=nf4 through grath_utils, which rounds the "
                "weights through NF4 and keeps them trainable on a CPU"
            )
