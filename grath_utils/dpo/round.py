"""One round of direct preference optimisation (Rafailov et al., arXiv 2305.18290) with QLoRA.

The reference's log-probabilities never change within a round, so they are computed once, before
training, and the reference model is then gone from memory.
"""

from __future__ import annotations

import contextlib
import gc
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from grath_utils import __version__
from grath_utils.config import DPOConfig, LoraConfig, ModelConfig, own_settings
from grath_utils.dpo.adapters import (
    Weights,
    add_adapter,
    full_adapter,
    model_after,
    refuse_cpu_4bit,
    save_adapter,
)
from grath_utils.dpo.data import PreferenceExample, tokenize_pairs
from grath_utils.engine import processes
from grath_utils.engine.encoding import Encoded, Request
from grath_utils.engine.machine import TRAINING_BLOCK, keep_freed_memory
from grath_utils.engine.models import Policy, activate_adapters
from grath_utils.engine.scoring import plan_encoded, run_plan
from grath_utils.errors import DataError, RunError, UsageError
from grath_utils.files import (
    PARTIAL,
    cache_dir,
    check_new_folder,
    fingerprint,
    read_json,
    write_cache,
    write_json,
    write_jsonl,
)
from grath_utils.pairs.generate import Pair

IDENTITY = "identity.json"  # beside the checkpoints: which training they belong to
WHOLE = "checkpoint-*/complete.json"  # in every checkpoint that was written to its end
# What stands in that folder: TRL adds a README.
_NAMES = re.compile(
    rf"checkpoint-\d+|README\.md|runs|{re.escape(IDENTITY)}|\..+{re.escape(PARTIAL)}"
)


@dataclass(frozen=True)
class TrainingReport:
    """What one round did; ``log`` has the rows of ``training_log.jsonl``."""

    pairs: int
    held_out: int
    over_long: int
    trainable_parameters: int
    steps: int
    log: tuple[dict[str, Any], ...]


def check_folder(folder: Path) -> None:
    """Check that :func:`train_round` may use a folder: an empty one, or one that it has begun with.

    UsageError if it holds something else, or a finished round.
    """
    if (folder / "adapter").exists():
        raise UsageError(f"{folder / 'adapter'} exists already; choose another folder")
    checkpoints = folder / "checkpoints"
    # What was killed before it noted whose training it is has left an empty folder, alone.
    alone = checkpoints.is_dir() and list(folder.iterdir()) == [checkpoints]
    if not (_is_of_a_round(checkpoints) and (alone or any(checkpoints.iterdir()))):
        check_new_folder(folder)


def _is_of_a_round(checkpoints: Path) -> bool:
    """Return True for a folder of checkpoints, empty or not, with nothing in it but a round's."""
    if not checkpoints.is_dir():
        return False
    names = [path.name for path in checkpoints.iterdir()]
    if not all(map(_NAMES.fullmatch, names)):
        return False
    if IDENTITY in names:
        with contextlib.suppress(DataError):
            return read_json(checkpoints / IDENTITY, {"identity": str}).keys() == {"identity"}
        return False
    return any(checkpoints.glob(WHOLE)) or all(name.endswith(PARTIAL) for name in names)


def _remove_checkpoints(checkpoints: Path) -> None:
    """Remove what training left; a folder that holds anything else stays, with that in it."""
    for path in (path for path in checkpoints.glob("*") if _NAMES.fullmatch(path.name)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        checkpoints.rmdir()


def _ids(examples: Sequence[PreferenceExample]) -> list[list[Sequence[int]]]:
    return [[e.prompt_ids, e.chosen_ids, e.rejected_ids] for e in examples]


def _check_resumed(checkpoints: Path, identity: str) -> None:
    """Note which training the checkpoints belong to, or check that it is this one."""
    path, ours = checkpoints / IDENTITY, {"identity": identity}
    if path.exists() and any(checkpoints.glob(WHOLE)) and read_json(path) != ours:
        raise RunError(
            f"{checkpoints} was left by a training on other pairs, or with other settings; delete "
            "it to begin anew, or choose another folder"
        )
    write_json(path, ours)


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

    An interrupted round resumes from its last checkpoint and ends with the same adapter.

    Args:
        held_out: pairs of other questions, on which the margin is measured; may be empty.
        seed: of the adapter's initialisation and the order of the data.
        previous: the previous round's adapter.

    Raises:
        DataError: there is no pair to train on.
        TrainingError: a LoRA target matches nothing, or the loss is not finite.
        RunError: the folder has checkpoints of another training.
    """
    if not pairs:
        raise DataError("no pair to train on: every question was rejected or held out")
    before = model_after(base, previous)  # the model that wrote the pairs
    reference = Weights(base) if dpo.reference == "base" else before
    # The official code means to continue, but starts afresh from its second round: there, the
    # loaded adapter is silently re-initialised.
    start = Weights(base) if dpo.chain == "fresh" else before
    continued = dpo.chain == "continue" and previous is not None
    # Where no adapter is continued, the start is the base with all of its adapters folded in.
    policy = reference.load(fold_last=reference == start and not continued)
    longest = min(dpo.max_length, policy.max_length)
    limits = {"max_prompt_length": dpo.max_prompt_length, "max_length": longest}
    data, held = (
        tokenize_pairs(policy.tokenizer, part, prompt_format=dpo.prompt_format, **limits)
        for part in (pairs, held_out)
    )
    examples = data.examples + held.examples
    ids = [_ids(part.examples) for part in (data, held)]
    settings = [own_settings(replace(dpo, report_to=())), own_settings(lora), seed]
    identity = fingerprint([start.fingerprint(), reference.fingerprint(), ids, settings])
    processes.on_main(lambda: _check_resumed(folder / "checkpoints", identity))
    if reference != start:
        table = _reference_table(policy, examples, reference, progress=progress)
        del policy  # one model in memory at a time
        policy = start.load(fold_last=not continued)
    refuse_cpu_4bit(policy.model)
    if continued:
        activate_adapters(policy.model, trainable=True)
    else:
        policy = add_adapter(policy, lora, seed)
    if reference == start:  # measured on the very policy that trains: the margin starts at 0
        table = _reference_table(policy, examples, reference, progress=progress)
    gc.collect()
    keep_freed_memory(policy.config.device, TRAINING_BLOCK)
    rows = [
        {**vars(example), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        for example, chosen, rejected in zip(examples, *table, strict=True)
    ]
    # TRL takes seconds to import: only training pays for it.
    from grath_utils.dpo.trainer import run_trainer

    parts = rows[: len(data.examples)], rows[len(data.examples) :]
    how = {"config": dpo, "seed": seed, "progress": progress}
    log = run_trainer(policy, *parts, folder=folder / "checkpoints", **how)
    keep_freed_memory(policy.config.device)
    weights = full_adapter(policy.model)
    merged = start.adapters[:-1] if continued else start.adapters

    def save() -> None:
        write_jsonl(folder / "training_log.jsonl", log)
        save_adapter(policy, weights, folder / "adapter", base=base, merged=merged)  # means "done"
        _remove_checkpoints(folder / "checkpoints")

    processes.on_main(save)
    return TrainingReport(
        pairs=len(data.examples),
        held_out=len(held.examples),
        over_long=len(data.over_long) + len(held.over_long),
        trainable_parameters=sum(map(torch.numel, weights.values())),
        steps=dpo.steps,
        log=tuple(log),
    )


def reference_log_probs(
    policy: Policy, examples: Sequence[PreferenceExample], *, progress: bool = True
) -> tuple[list[float], list[float]]:
    """Return the summed log-probabilities of all chosen and all rejected answers, in order."""
    encoded, requests = [], []
    for example in examples:
        prompt = np.array(example.prompt_ids, dtype=np.int32)
        for ids in (example.chosen_ids, example.rejected_ids):
            encoded.append(Encoded(prompt, ids, straddles=False))
            requests.append(Request("", policy.tokenizer.decode(ids), f"pair {example.id}"))
    plan = plan_encoded(policy, encoded)
    hidden = not (progress and processes.is_main())
    with tqdm(total=plan.work.computed, desc="Reference", unit="token", disable=hidden) as bar:
        scores = run_plan(
            policy, requests, plan, on_batch=lambda _n, _v, tokens: bar.update(tokens), split=True
        )
    values = [score.logprob for score in scores]
    return values[::2], values[1::2]


def _fits(
    table: Sequence[list[float]], policy: Policy, examples: Sequence[PreferenceExample]
) -> bool:
    """Return True if a table is of so many pairs, and its first pair comes out again."""
    nats = 0.01 if policy.config.dtype == "float32" else 0.05  # for each token
    answers = examples[0].chosen_ids, examples[0].rejected_ids
    found = reference_log_probs(policy, examples[:1], progress=False)
    return all(
        len(side) == len(examples) and abs(side[0] - now) <= nats * len(answer)
        for side, answer, [now] in zip(table, answers, found, strict=True)
    )


def _reference_table(
    policy: Policy, examples: Sequence[PreferenceExample], weights: Weights, *, progress: bool
) -> tuple[list[float], list[float]]:
    """Return the reference log-probabilities, from the cache where the same ones were computed.

    The whole table is the unit: in bfloat16 the last digits depend on what was computed together.
    Its first pair is computed again: an earlier version may have left another table.
    """
    here = [policy.device.type, torch.__version__, __version__]
    key = fingerprint([weights.fingerprint(), here, _ids(examples)])
    cache = cache_dir() / "reference" / f"{key}.json"

    def stored() -> tuple[list[float], list[float]] | None:
        with contextlib.suppress(DataError):  # absent or damaged: computed again
            kept = read_json(cache, {"chosen": [float], "rejected": [float]})
            return kept["chosen"], kept["rejected"]
        return None

    table = processes.on_main(stored)
    if table is None or not _fits(table, policy, examples):
        table = reference_log_probs(policy, examples, progress=progress)
        if processes.is_main():
            write_cache(cache, {"chosen": table[0], "rejected": table[1]})
    return table
