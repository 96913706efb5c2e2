"""LoRA adapters: a base with adapters on it, a new adapter, and how one is saved."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from grath_utils.config import LoraConfig, ModelConfig
from grath_utils.engine.course_models import published
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
from grath_utils.errors import TrainingError, reason_of
from grath_utils.files import atomic_path, fingerprint, write_json


@dataclass(frozen=True)
class Weights:
    """A set of weights by recipe: a base model and the adapters on it, in order."""

    base: ModelConfig
    adapters: tuple[Path, ...] = ()

    def load(self, *, fold_last: bool = False) -> Policy:
        """Load them, with all adapters but the last folded in, and the last on top if wanted."""
        return apply_adapters(load_base(self.base), self.adapters, fold_last=fold_last)

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
        TrainingError: a target names no linear layer, or one that cannot be adapted or trained; the
            layers that there are are listed.
    """
    import peft

    model = policy.model
    layers = _linear_layers(model)
    names = sorted({name.rpartition(".")[2] for name in layers} - {"base_layer"})
    targets = "all-linear" if lora.targets == ("all-linear",) else list(lora.targets)
    choice = f"; its linear layers are {', '.join(names)}"
    choice += "" if targets == "all-linear" else ", or say [all-linear]"
    if targets != "all-linear" and (problem := _wrong_targets(model, layers, targets)):
        raise TrainingError(problem + choice)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
    )
    set_seed(seed)  # LoRA's A matrices are drawn here
    with quiet_transformers(), warnings.catch_warnings(action="ignore"):
        try:
            if hasattr(model, "peft_config"):  # beside the folded adapters of a quantized model
                model.add_adapter(TOP, settings)
            else:
                model = peft.get_peft_model(model, settings)
        except ValueError as error:  # a kind of layer that peft cannot adapt, or not in this model
            raise TrainingError(f"lora.targets: {reason_of(error)}{choice}") from error
    activate_adapters(model, trainable=True)
    if problem := _why_untrainable(model):
        raise TrainingError(f"lora.targets: {problem}{choice}")
    return replace(policy, model=model)


def _linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the layers that can be adapted, by name: the linear ones, without the output head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if (hasattr(module, "in_features") or isinstance(module, Conv1D)) and module is not head
        if ".lora_" not in name
    }


def _wrong_targets(
    model: torch.nn.Module, layers: Mapping[str, torch.nn.Module], targets: Sequence[str]
) -> str:
    """Return what is wrong with names of layers to adapt, or ''; each names some linear layer."""
    absent, others = [], []
    for target in targets:
        if not _ends_with(layers, target):
            modules = dict(model.named_modules())
            if found := _ends_with(modules, target):
                head = modules[found[0]] is model.get_output_embeddings()
                kind = "the output head" if head else type(modules[found[0]]).__name__
                others.append(f"{target} ({kind})")
            elif _ends_with(dict(model.named_parameters()), target):
                others.append(f"{target} (weights without a layer)")
            else:
                absent.append(target)
    if others:
        return f"lora.targets names what cannot be adapted: {', '.join(others)}"
    if absent:
        return f"lora.targets names layers that this model does not have: {', '.join(absent)}"
    return ""


def _ends_with(names: Iterable[str], target: str) -> list[str]:
    """Return the names that peft takes a target to mean: itself, or with a path before it."""
    return [name for name in names if f".{name}".endswith(f".{target}")]


def _why_untrainable(model: torch.nn.Module) -> str:
    """Run a few tokens forward and back; return what keeps the adapters from being trained, or ''.

    Fused kernels, and some models, read the weight of a layer that they never call; others have
    layers that give more than one output.
    """
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(8, device=embedding.device).remainder(len(embedding))[None]
    model.eval()
    try:
        model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
    except (AttributeError, TypeError, ValueError, IndexError) as error:  # of the model's own code
        return f"with these layers adapted, the model's forward pass fails ({error})"
    reached: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = name.partition(".lora_")[0].rpartition(".")[2]
            reached[kind] = reached.get(kind, False) or parameter.grad is not None
    model.zero_grad()
    lost = sorted(kind for kind, good in reached.items() if not good)
    if not lost:
        return ""
    return (
        f"adapters on {', '.join(lost)} would never be trained, since this model reads those "
        "weights without calling the layers; leave them out"
    )


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
        origin = published(base)  # plain peft looks there, on the Hub
        settings.base_model_name_or_path, settings.revision = origin.name, origin.revision
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
