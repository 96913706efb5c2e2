"""The bridge to TRL: one round of its ``DPOTrainer`` on token ids that are ready.

TRL computes the loss, steps the optimiser and writes checkpoints. What is ours: the token ids and
the reference log-probabilities come in with the data, a batch is computed without repeating what
its sequences share, a checkpoint counts only when it is whole, and a loss that is not finite stops
the round.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.utils.logging import disable_progress_bar, enable_progress_bar
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig as TRLConfig
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from grath_utils.config import DPOConfig
from grath_utils.dpo.global_batch import PieceLoader, Pieces, Split, split_batch
from grath_utils.dpo.tracking import check_trackers, training_callbacks, trl_trackers
from grath_utils.engine import processes
from grath_utils.engine.models import Policy, activate_adapters, quiet_transformers
from grath_utils.engine.packing import PackedCollator, packed_forward, row_limit
from grath_utils.engine.scoring import accepts, can_run_trees
from grath_utils.errors import CollapseError, ConfigError, TrainingError
from grath_utils.files import explained_write_errors, write_json

COMPLETE = "complete.json"  # written into a checkpoint after everything else

# TRL's names -> ours. Log-probabilities are sums over answer tokens, in nats.
LOGGED = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "logps/chosen": "logp_chosen",
    "logps/rejected": "logp_rejected",
}


class ReadyDataTrainer(DPOTrainer):
    """``DPOTrainer`` for rows that already hold token ids and reference log-probabilities.

    With several processes, each trains on its pieces of every batch (:mod:`global_batch`) and
    measures all held-out pairs itself: they are few, and a mean is then the same in each.
    """

    selects = True  # the model's forward takes `logits_to_keep`
    pieces: Pieces | None = None  # with several processes: which pairs are this one's

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        share, scale = inputs.pop("share", None), inputs.pop("scale", None)
        if "rows" in inputs:  # packed: every loss of TRL's, on log-probabilities computed our way
            dtype = self.accelerator.unwrap_model(model).get_input_embeddings().weight.dtype
            model = packed_forward(model, dtype, selects=self.selects)
        if self.pieces is None:
            return super()._compute_loss(model, inputs, return_outputs)
        with _ungathered(self.accelerator):
            loss = super()._compute_loss(model, inputs, return_outputs)
        if share is None:  # a held-out batch
            return loss
        self.shares.append(share)
        return loss * scale

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.pieces is not None and self.model.training:
            self._metrics["train"].update(_combined(self._metrics["train"], self.shares))
            self.shares.clear()
        super().log(logs, start_time)

    def get_train_dataloader(self) -> Any:
        if self.pieces is None:
            return super().get_train_dataloader()
        self.shares: list[float] = []
        return PieceLoader(self.train_dataset, self.pieces, self.data_collator)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if self.pieces is None:
            return super().get_eval_dataloader(eval_dataset)
        size = self.args.per_device_eval_batch_size
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(rows, batch_size=size, collate_fn=self.data_collator)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with explained_write_errors(Path(self.args.output_dir) / "checkpoint"):
            super()._save_checkpoint(*args, **kwargs)

    def use_given_reference(self) -> None:
        """Read the reference from the data; drop the copy of the adapter that TRL made for it."""
        self.precompute_ref_logps = True
        peft_model = self.accelerator.unwrap_model(self.model)
        if "ref" in peft_model.peft_config:
            peft_model.delete_adapter("ref")
        activate_adapters(peft_model, trainable=True)


def run_trainer(
    policy: Policy,
    train_rows: Sequence[dict[str, Any]],
    held_out_rows: Sequence[dict[str, Any]],
    folder: Path,
    config: DPOConfig,
    seed: int,
    *,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train the policy's adapter in place and return the log, one row a logged step.

    Args:
        policy: a policy whose adapter, and nothing else, requires gradients.
        train_rows: ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, ``ref_chosen_logps``,
            ``ref_rejected_logps``.
        held_out_rows: the same for held-out questions; may be empty.
        folder: for checkpoints; an interrupted round goes on from the last whole one.
        config: hyper-parameters.
        seed: order of the data.
        progress: show a progress bar.

    Returns:
        Rows ``{"step", "split": "train" | "held_out", "loss", "margin", "accuracy", "logp_chosen",
        "logp_rejected", ...}``. Step 0 of ``held_out`` is measured before any update.

    Raises:
        TrainingError: the loss is not finite, or nothing is trainable.
        ConfigError: the loss or the optimiser is not one that TRL or transformers know, the batch
            cannot be divided among the processes, or a tracker is not there.
    """
    if not any(p.requires_grad for p in policy.model.parameters()):
        raise TrainingError("nothing to train: no parameter of the adapter requires a gradient")
    check_trackers(config.report_to)
    folder.mkdir(parents=True, exist_ok=True)
    split = split_batch(config, processes.size())
    collator: Any = DataCollatorForPreference(policy.tokenizer.pad_token_id)
    # Where the weights are split, all processes have to call the model equally often.
    if not processes.sharded() and can_run_trees(policy, _longest([*train_rows, *held_out_rows])):
        collator = PackedCollator(collator, row_limit(policy.device))
    adapter = {n: p.detach().clone() for n, p in policy.model.named_parameters() if p.requires_grad}
    with _quiet():
        trainer = ReadyDataTrainer(
            model=policy.model,
            args=_arguments(policy, config, split, folder, seed, bool(held_out_rows)),
            train_dataset=Dataset.from_list(list(train_rows)),
            eval_dataset=Dataset.from_list(list(held_out_rows)) if held_out_rows else None,
            processing_class=policy.tokenizer,
            data_collator=collator,
        )
        trainer.selects = accepts(policy.model, "logits_to_keep")
        if split.processes > 1:
            trainer.pieces = Pieces(len(train_rows), seed, config, split, processes.rank())
        trainer.use_given_reference()
        # TRL rounds the adapter of a quantized model to bfloat16, where small steps are lost.
        for name, weights in adapter.items():
            policy.model.get_parameter(name).data = weights
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(_Watch(config, progress and processes.is_main()))
        checkpoint = processes.on_main(lambda: _last_checkpoint(folder))
        done = _step_of(Path(checkpoint)) if checkpoint else 0
        for callback in training_callbacks(config.report_to, folder.parent / "tensorboard", done):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=checkpoint)
    policy.model.eval()
    return _log_rows(trainer.state.log_history)


def _longest(rows: Sequence[dict[str, Any]]) -> int:
    return max(
        len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows
    )


@contextmanager
def _ungathered(accelerator: Any) -> Iterator[None]:
    """Keep TRL's metrics in this process: pieces differ in size, so gathering them would hang."""
    accelerator.gather = accelerator.gather_for_metrics = lambda tensor: tensor
    try:
        yield
    finally:  # the methods of the class show again
        del accelerator.gather, accelerator.gather_for_metrics


def _combined(
    metrics: Mapping[str, Sequence[float]], shares: Sequence[float]
) -> dict[str, list[float]]:
    """Return the mean of each metric over the pieces of all processes, each by its share."""
    full = {name: values for name, values in metrics.items() if len(values) == len(shares)}
    sums = {name: sum(s * v for s, v in zip(shares, full[name], strict=True)) for name in full}
    everywhere = processes.gather((sums, sum(shares)))
    total = sum(weight for _, weight in everywhere)
    return {name: [sum(part[name] for part, _ in everywhere) / total] for name in full}


def _arguments(
    policy: Policy, config: DPOConfig, split: Split, folder: Path, seed: int, evaluates: bool
) -> TRLConfig:
    on_cpu = policy.device.type == "cpu"
    try:
        arguments = TRLConfig(
            output_dir=str(folder),
            beta=config.beta,
            loss_type=[config.loss],
            label_smoothing=config.label_smoothing,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.schedule,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            optim=config.optimizer,
            max_steps=config.steps,
            per_device_train_batch_size=split.piece,
            per_device_eval_batch_size=config.micro_batch_size,
            gradient_accumulation_steps=split.accumulation,
            gradient_checkpointing=config.gradient_checkpointing,
            max_length=None,  # the pairs were measured and chosen already
            # The weights are in the compute type already; autocast would only convert them again.
            bf16=False,
            # float16 loses small gradients unless the loss is scaled, which comes with autocast.
            fp16=policy.config.dtype == "float16" and not on_cpu,
            use_cpu=on_cpu,
            # A row more in one process must not leave another waiting for its buffers.
            ddp_broadcast_buffers=False,
            ddp_find_unused_parameters=False,
            seed=seed,
            data_seed=seed,
            logging_steps=config.log_every,
            eval_strategy="steps" if evaluates else "no",
            eval_steps=config.evaluate_every,
            eval_on_start=evaluates,
            save_steps=config.save_every,
            save_total_limit=2,
            report_to=trl_trackers(config.report_to),
            disable_tqdm=True,
            dataloader_pin_memory=not on_cpu,
            remove_unused_columns=False,
        )
    except (ValueError, KeyError) as error:
        raise ConfigError(f"the trainer refuses these dpo settings: {error}") from error
    if arguments.n_gpu > 1:  # one process uses one GPU; a launcher starts a process for each
        arguments._n_gpu = 1
    return arguments


class _Watch(TrainerCallback):
    """Progress bar, checkpoint markers, and a stop where training has diverged or collapsed."""

    def __init__(self, config: DPOConfig, progress: bool) -> None:
        self.config = config
        self.bar = tqdm(total=config.steps, desc="DPO", unit="step", disable=not progress)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if kwargs.get("model") is not None:  # reading a checkpoint leaves the top adapter alone
            activate_adapters(kwargs["model"], trainable=True)
        self.bar.update(state.global_step - self.bar.n)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        for key in ("loss", "grad_norm", "eval_loss"):
            value = logs.get(key)
            if value is not None and not math.isfinite(float(value)):
                raise TrainingError(
                    f"{key} is {value} at step {state.global_step}: training has diverged; lower "
                    "dpo.learning_rate, or raise dpo.warmup_steps"
                )
        for key in ("rewards/chosen", "eval_rewards/chosen"):
            lost = -float(logs.get(key, 0.0)) / self.config.beta  # a reward is beta times nats
            if lost > self.config.max_displacement:
                raise CollapseError(
                    f"at step {state.global_step} the chosen answers have lost {lost:.0f} nats on "
                    "average: the model no longer writes anything like them (likelihood "
                    "displacement). Raise dpo.beta, lower dpo.learning_rate or dpo.steps; "
                    "dpo.max_displacement is the limit that was passed"
                )
        if "loss" in logs:
            margin = float(logs.get("rewards/margins", 0.0))
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}, margin {margin:+.2f}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        processes.barrier()  # each process has its own file in it
        processes.on_main(lambda: write_json(checkpoint / COMPLETE, {"step": state.global_step}))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def _last_checkpoint(folder: Path) -> str | None:
    """Return the newest whole checkpoint; remove those that a killed process left half-written."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).is_file():
            whole.append((_step_of(path), path))
        else:
            shutil.rmtree(path)
    return str(max(whole)[1]) if whole else None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _log_rows(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows, seen = [], set()
    for entry in history:
        held_out = "eval_loss" in entry
        prefix = "eval_" if held_out else ""
        if prefix + "loss" not in entry:
            continue  # the summary of the whole run
        split, step = "held_out" if held_out else "train", int(entry["step"])
        if (split, step) in seen:
            continue  # a resumed round measures its first step once more
        seen.add((split, step))
        row: dict[str, Any] = {"step": step, "split": split}
        for theirs, ours in LOGGED.items():
            if prefix + theirs in entry:
                row[ours] = float(entry[prefix + theirs])
        rows.append(row)
    return rows


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' own bars and notices out of the notebook; ours say what matters."""
    disable_progress_bar()
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        enable_progress_bar()
