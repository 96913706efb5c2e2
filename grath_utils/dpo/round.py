"""One round of direct preference optimisation (Rafailov et al., arXiv 2305.18290) with QLoRA.

Three questions decide what a round is, and each has one answer here:

* Which weights does training start from? ``chain`` (:func:`start_of_round`).
* Which model is the reference? ``reference`` (:func:`reference_of_round`).
* Which layers are trained? ``lora.targets`` (:func:`add_adapter`).

The reference's log-probabilities never change within a round, so they are computed once, before
training, and the reference model is then gone from memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from grath_utils import __version__
from grath_utils.config import DPOConfig, LoraConfig, ModelConfig
from grath_utils.dpo.data import PreferenceData, PreferenceExample, tokenize_pairs
from grath_utils.engine import processes
from grath_utils.engine.encoding import Encoded, Request
from grath_utils.engine.models import (
    ADAPTER_RECORD,
    TOP,
    TRAINING_BLOCK,
    Policy,
    activate_adapters,
    adapter_fingerprint,
    apply_adapters,
    base_weights_fingerprint,
    keep_freed_memory,
    load_base,
    merged_before,
    quiet_transformers,
)
from grath_utils.engine.scoring import plan_encoded, run_plan
from grath_utils.errors import DataError, RunError, TrainingError
from grath_utils.files import (
    atomic_path,
    cache_dir,
    fingerprint,
    read_json,
    write_json,
    write_jsonl,
)
from grath_utils.pairs.generate import Pair

# --- the mathematics -----------------------------------------------------------------------------


def completion_log_probs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the summed log-probability of each sequence's completion, shape (2 B,), float32.

    ``log pi(y | x) = sum_t log pi(y_t | x, y_<t)``: summed, not averaged, as DPO's derivation has
    it. Positions before the first completion token of the batch skip the output head.
    """
    ids, completion_mask = batch["input_ids"], batch["completion_mask"]
    first = int(completion_mask.argmax(dim=1).min())  # first completion token in any row
    keep = ids.shape[1] - first + 1  # its prediction is made one position earlier
    logits = model(
        input_ids=ids,
        attention_mask=batch["attention_mask"],
        logits_to_keep=keep,
        use_cache=False,
    ).logits[:, :-1]  # (2 B, T - first, V); the last position predicts beyond the sequence
    targets = ids[:, first:]  # (2 B, T - first)
    log_probs = F.log_softmax(logits.float(), dim=-1)
    token_log_probs = log_probs.gather(2, targets.unsqueeze(2)).squeeze(2)
    return (token_log_probs * completion_mask[:, first:]).sum(dim=1)


def preference_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the DPO loss and the reward margin of each pair (equation 7 of the DPO paper).

    Args:
        policy_chosen: summed log-probability of the chosen answer under the policy, shape (B,).
        policy_rejected: the same for the rejected answer.
        reference_chosen: the chosen answer under the reference.
        reference_rejected: the rejected answer under the reference.
        beta: strength of the pull to the reference.

    Returns:
        ``(losses, margins)``, each of shape (B,), in nats. When policy = reference, every margin is
        0 and every loss ln 2.
    """
    chosen_reward = beta * (policy_chosen - reference_chosen)  # equation 5, without log Z(x)
    rejected_reward = beta * (policy_rejected - reference_rejected)
    margin = chosen_reward - rejected_reward  # log Z(x) cancels here
    return -F.logsigmoid(margin), margin


# --- where a round starts, and what it is compared with ------------------------------------------


@dataclass(frozen=True)
class Weights:
    """A set of weights by recipe: a base model and the adapters on it, in order."""

    base: ModelConfig
    adapters: tuple[Path, ...] = ()

    def load(self, *, fold_last: bool = False) -> Policy:
        """Load them; all adapters but the last are folded in, the last stays on top if wanted."""
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
    if adapter is None:
        return Weights(base)
    return Weights(base, (*merged_before(adapter), adapter))


def start_of_round(base: ModelConfig, previous: Path | None, chain: str) -> tuple[Weights, bool]:
    """Return the weights that training starts from, and whether their last adapter trains on.

    Args:
        base: the base model.
        previous: the previous round's adapter, None in the first round.
        chain: ``continue`` trains the same adapter on; ``merge`` folds it in and adds a new one;
            ``fresh`` starts from the base again (what the official code does from its second round
            on, where the loaded adapter is silently re-initialised).
    """
    if previous is None or chain == "fresh":
        return Weights(base), False
    return model_after(base, previous), chain == "continue"


def reference_of_round(base: ModelConfig, previous: Path | None, reference: str) -> Weights:
    """Return the reference's weights: the pretrained model, or the model that wrote the pairs.

    ``current`` is the previous round's model also where ``chain=fresh`` starts training elsewhere.
    """
    return model_after(base, None if reference == "base" else previous)


def add_adapter(policy: Policy, lora: LoraConfig, seed: int) -> Policy:
    """Put a new LoRA adapter on the policy; its B matrices are 0, so nothing changes yet.

    Raises:
        TrainingError: a target name matches no linear layer; the names that exist are listed.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    all_linear = lora.targets == ("all-linear",)
    if not all_linear:
        _check_targets(policy.model, lora.targets)
    settings = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if all_linear else list(lora.targets),
        bias="none",
    )
    set_seed(seed)  # LoRA's A matrices are drawn here
    with quiet_transformers():
        if hasattr(policy.model, "peft_config"):  # beside the folded adapters of a quantized model
            model = policy.model
            model.add_adapter(TOP, settings)
        else:
            model = get_peft_model(policy.model, settings)
        activate_adapters(model, trainable=True)
    return replace(policy, model=model)


def _check_targets(model: torch.nn.Module, targets: Sequence[str]) -> None:
    linear = {
        name.rsplit(".", 1)[-1] for name, m in model.named_modules() if hasattr(m, "in_features")
    }
    missing = [name for name in targets if name not in linear]
    if missing:
        raise TrainingError(
            f"lora.targets names layers that this model does not have: {', '.join(missing)}; "
            f"its linear layers are {', '.join(sorted(linear - {'lm_head'}))}, "
            "or say [all-linear]"
        )


def set_seed(seed: int) -> None:
    """Seed every random generator that training touches."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# --- reference log-probabilities -----------------------------------------------------------------


def reference_log_probs(
    policy: Policy, examples: Sequence[PreferenceExample], *, progress: bool = True
) -> tuple[list[float], list[float]]:
    """Return the summed log-probabilities of all chosen and all rejected answers, in order.

    Raises:
        ScoringError: one of them is not finite; the pair is named.
    """
    sides = [(e, ids) for e in examples for ids in (e.chosen_ids, e.rejected_ids)]
    encoded = [
        Encoded(np.array(e.prompt_ids, dtype=np.int32), ids, straddles=False) for e, ids in sides
    ]
    named = [Request("", policy.tokenizer.decode(ids), f"pair {e.id}") for e, ids in sides]
    plan = plan_encoded(policy, encoded)
    with tqdm(
        total=plan.work.computed,
        desc="Reference",
        unit="token",
        disable=not (progress and processes.is_main()),
    ) as bar:
        scores = run_plan(
            policy, named, plan, on_batch=lambda _n, _v, tokens: bar.update(tokens), split=True
        )
    values = [score.logprob for score in scores]
    return values[::2], values[1::2]


def _reference_table(
    policy: Policy, data: PreferenceData, weights: Weights, *, progress: bool
) -> tuple[list[float], list[float]]:
    """Return the reference log-probabilities, from the cache where the same ones were computed.

    The whole table is the unit: in bfloat16 the last digits depend on what was computed together,
    so a table put together from pieces would make a result depend on what ran before it.
    """
    key = fingerprint(
        [
            weights.fingerprint(),
            [policy.device.type, torch.__version__, __version__],
            [[e.prompt_ids, e.chosen_ids, e.rejected_ids] for e in data.examples],
        ]
    )
    cache = cache_dir() / "reference" / f"{key}.json"
    stored = processes.on_main(lambda: _stored_table(cache, len(data.examples)))
    if stored is not None:
        return stored
    chosen, rejected = reference_log_probs(policy, data.examples, progress=progress)
    if processes.is_main():
        with contextlib.suppress(RunError):  # a read-only cache costs time, nothing else
            write_json(cache, {"chosen": chosen, "rejected": rejected})
    return chosen, rejected


def _stored_table(cache: Path, count: int) -> tuple[list[float], list[float]] | None:
    with contextlib.suppress(DataError, KeyError, TypeError):  # damaged: computed again
        stored = read_json(cache)
        if len(stored["chosen"]) == len(stored["rejected"]) == count:
            return stored["chosen"], stored["rejected"]
    return None


# --- one round -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingReport:
    """What one round did."""

    pairs: int
    held_out: int
    over_long: int
    trainable_parameters: int
    steps: int
    log: tuple[dict[str, Any], ...]
    """The rows of ``training_log.jsonl``."""


def train_round(
    base: ModelConfig,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    folder: Path,
    *,
    dpo: DPOConfig,
    lora: LoraConfig,
    seed: int,
    previous: Path | None = None,
    progress: bool = True,
) -> TrainingReport:
    """Run one DPO round and leave ``adapter/`` and ``training_log.jsonl`` in ``folder``.

    A round that was interrupted goes on from its last checkpoint and ends with the same adapter as
    one that was not.

    Args:
        base: the base model, its quantization and dtype.
        pairs: what to train on.
        held_out: pairs of other questions, to measure the margin on; may be empty.
        folder: the iteration's folder.
        dpo: hyper-parameters.
        lora: the adapter's shape.
        seed: reaches the adapter's initialisation and the order of the data.
        previous: the previous round's adapter.
        progress: show progress bars.

    Raises:
        DataError: there is no pair to train on.
        TrainingError: a LoRA target matches nothing, or the loss is not finite.
    """
    if not pairs:
        raise DataError("no pair to train on: every question was rejected or held out")
    start, trains_on = start_of_round(base, previous, dpo.chain)
    reference = reference_of_round(base, previous, dpo.reference)
    # Where no adapter trains on, the start is the base with all of its adapters folded in.
    policy = reference.load(fold_last=reference == start and not trains_on)
    limits = {"max_prompt_length": dpo.max_prompt_length, "max_length": dpo.max_length}
    tokenize = {"prompt_format": dpo.prompt_format, **limits}
    data = tokenize_pairs(policy.tokenizer, pairs, **tokenize)
    held = (
        tokenize_pairs(policy.tokenizer, held_out, **tokenize)
        if held_out
        else PreferenceData((), ())
    )
    both = PreferenceData(data.examples + held.examples, ())
    if reference != start:
        table = _reference_table(policy, both, reference, progress=progress)
        del policy  # one model in memory at a time
        gc.collect()
        policy = start.load(fold_last=not trains_on)
    _refuse_cpu_linear4bit(policy.model)
    if trains_on:
        activate_adapters(policy.model, trainable=True)
    else:
        policy = add_adapter(policy, lora, seed)
    if reference == start:  # measured on the very policy that trains: the margin starts at 0
        table = _reference_table(policy, both, reference, progress=progress)
    gc.collect()
    keep_freed_memory(policy.config.device, TRAINING_BLOCK)
    rows = _training_rows(both, *table)
    split = len(data.examples)
    # TRL takes seconds to import: only training pays for it.
    from grath_utils.dpo.trainer import run_trainer

    log = run_trainer(
        policy, rows[:split], rows[split:], folder / "checkpoints", dpo, seed, progress=progress
    )
    keep_freed_memory(policy.config.device)
    merged = start.adapters[:-1] if trains_on else start.adapters
    weights = full_adapter(policy.model)

    def leave() -> None:
        write_jsonl(folder / "training_log.jsonl", log)
        # Last: its presence means "done".
        _save_adapter(policy, weights, folder / "adapter", base, merged)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    processes.on_main(leave)
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    return TrainingReport(
        pairs=len(data.examples),
        held_out=len(held.examples),
        over_long=len(data.over_long) + len(held.over_long),
        trainable_parameters=trained,
        steps=dpo.steps,
        log=tuple(log),
    )


def _refuse_cpu_linear4bit(model: torch.nn.Module) -> None:
    """Stop before a silent failure: on a CPU, bitsandbytes' 4-bit layers lose their gradient.

    A ``Linear4bit`` that has once run inference on a CPU is repacked, and its backward pass then
    gives no gradient at all to whatever lies below it; PyTorch only warns.
    """
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear4bit", "LinearFP4", "LinearNF4"):
            weight = next(module.parameters())
            if weight.device.type == "cpu":
                raise TrainingError(
                    f"{name} is a bitsandbytes 4-bit layer on a CPU: after one inference pass it "
                    "gives no gradient, and training would silently do nothing below it. Load the "
                    "model with model.quantization=nf4 through grath_utils, which rounds the "
                    "weights through NF4 and keeps them trainable on a CPU"
                )


def _training_rows(
    data: PreferenceData, chosen: Sequence[float], rejected: Sequence[float]
) -> list[dict[str, Any]]:
    return [
        {
            "prompt_ids": list(e.prompt_ids),
            "chosen_ids": list(e.chosen_ids),
            "rejected_ids": list(e.rejected_ids),
            "ref_chosen_logps": chosen[i],
            "ref_rejected_logps": rejected[i],
        }
        for i, e in enumerate(data.examples)
    ]


def full_adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained weights by name, put together where FSDP has split them.

    Every process has to call it.
    """
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in trained.items()}


def _save_adapter(
    policy: Policy,
    weights: dict[str, torch.Tensor],
    folder: Path,
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
        write_json(
            partial / ADAPTER_RECORD,
            {
                "base": base.name,
                "base_weights": base_weights_fingerprint(base),
                "model": {**dataclasses.asdict(base), "device": "auto"},
                "merged": [Path(os.path.relpath(path, folder)).as_posix() for path in merged],
            },
        )
