"""The bridge to TRL: one round of its ``DPOTrainer`` on token ids that are ready.

TRL steps the optimiser, writes checkpoints and computes the losses other than DPO's own, which is
:func:`.loss.dpo_loss`. The reference log-probabilities come in with the data; a batch is computed
without repeating what its sequences share; a checkpoint counts only when it is whole.
"""

from __future__ import annotations

import math
import operator
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import GeneralTracker
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig as TRLConfig
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from grath_utils.config import DPOConfig
from grath_utils.dpo.global_batch import PieceBatches, piece_size
from grath_utils.dpo.loss import dpo_loss
from grath_utils.dpo.tracking import start_trackers
from grath_utils.engine import processes
from grath_utils.engine.attention import row_attention
from grath_utils.engine.machine import quiet_transformers
from grath_utils.engine.models import Policy, accepts, activate_adapters, unwrapped
from grath_utils.engine.packing import PackedCollator, packed_forward, padded_forward, row_limit
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

    Each process trains on its ``pieces`` of every batch, and measures all held-out pairs itself:
    they are few, and a mean is then the same in each.
    """

    def __init__(self, *, pieces: PieceBatches | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.pieces = pieces
        # What each batch since the last row of the log counts, beside TRL's own lists of means.
        self.shares: dict[str, list[float]] = {"train": [], "eval": []}
        # Pieces differ in size, so gathering TRL's metrics would hang.
        self.accelerator.gather = self.accelerator.gather_for_metrics = lambda tensor: tensor
        self.precompute_ref_logps = True  # the reference is read from the data
        if self.loss_types == ["sigmoid"]:
            self.loss_weights = [0.0]  # ours takes its place; what else TRL adds stays
        model = self.accelerator.unwrap_model(self.model)
        self.selects = accepts(model, "logits_to_keep")
        if "ref" in model.peft_config:  # the copy of the adapter that TRL made as reference
            model.delete_adapter("ref")
        activate_adapters(model, trainable=True)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        more = inputs.pop("more", [])
        loss = super().training_step(model, inputs, *args)
        for batch in more:
            loss = loss + super().training_step(model, batch, *args)
        return loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        share, scale = inputs.pop("share", None), inputs.pop("scale", 1.0)
        if self.model.training:
            _compute_as_scored(self.model)
        outputs = []
        forward = padded_forward(model, selects=self.selects)
        if "rows" in inputs:
            dtype = self.accelerator.unwrap_model(model).get_input_embeddings().weight.dtype
            forward = packed_forward(model, dtype, selects=self.selects)

        def remembered(**batch: Any) -> Any:
            outputs.append(forward(**batch))
            return outputs[0]

        loss = super()._compute_loss(remembered, inputs, False)  # TRL's losses, and all metrics
        if self.loss_types == ["sigmoid"]:
            losses, _, _ = dpo_loss(
                *outputs[0].log_probs.sum(dim=1).chunk(2),  # (2 B, T - 1): chosen, then rejected
                inputs["ref_chosen_logps"],
                inputs["ref_rejected_logps"],
                self.beta,
                label_smoothing=self.label_smoothing,
            )
            loss = loss + losses.mean()
        # A mean over batches is one over pairs only where each batch counts by its pairs.
        pairs = len(inputs["ref_chosen_logps"])
        self.shares[self._mode()].append(pairs if share is None else share)
        if not self.model.training:  # transformers' own mean counts by rows, however many pairs
            self._metrics["eval"]["loss"].append(loss.item())
        return loss * scale

    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean of each metric over the pieces of all processes, each by its share."""
        metrics, shares = self._metrics[self._mode()], self.shares[self._mode()]
        sums = {
            name: sum(map(operator.mul, shares, values))
            for name, values in metrics.items()
            if len(values) == len(shares)
        }
        everywhere = processes.gather((sums, sum(shares)))
        total = sum(weight for _, weight in everywhere)
        for name in sums:
            metrics[name] = [sum(part[name] for part, _ in everywhere) / total]
        shares.clear()
        super().log(logs, start_time)

    def get_train_dataloader(self) -> DataLoader:
        return self.pieces.loader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        size = self.args.per_device_eval_batch_size
        return DataLoader(self.eval_dataset, batch_size=size, collate_fn=self.data_collator)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with explained_write_errors(Path(self.args.output_dir)):
            super()._save_checkpoint(*args, **kwargs)


def _compute_as_scored(model: Any) -> None:
    """Put a model that trains into evaluation mode, all but the adapter's dropout.

    The reference was measured in that mode, and models differ between the two by more than their
    dropout: noise in a router, weights clamped in place, kernels that read weights past an adapter.
    """
    for name, module in model.named_modules():
        recomputes = getattr(module, "gradient_checkpointing", False)  # in training mode only
        module.training = bool(recomputes) or "lora_dropout" in name
        for key, value in list(vars(module).items()) if recomputes else ():
            if "drop" in key and isinstance(value, float):
                setattr(module, key, 0.0)
    model.training = True  # the trainer's own mode


def run_trainer(
    policy: Policy,
    train_rows: Sequence[dict[str, Any]],
    held_out_rows: Sequence[dict[str, Any]],
    *,
    folder: Path,
    config: DPOConfig,
    seed: int,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train the policy's adapter in place, and return the log.

    Checkpoints go to ``folder``; an interrupted round resumes from the last whole one. Rows hold
    ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, ``ref_chosen_logps`` and
    ``ref_rejected_logps`` of each pair; those of the log ``{"step", "split": "train" | "held_out",
    ...}`` with the values of :data:`LOGGED`. Step 0 of ``held_out`` is before any update.

    Raises:
        TrainingError: the loss is not finite, or the chosen answers have collapsed.
        ConfigError: TRL or transformers refuse a setting, the batch cannot be divided among the
            processes, or a tracker is not there.
    """
    done, checkpoint = processes.on_main(lambda: _last_checkpoint(folder))
    trackers = start_trackers(config.report_to, folder.parent / "tensorboard", resumed_at=done)
    collator: Any = DataCollatorForPreference(policy.tokenizer.pad_token_id or 0)
    longest = max(
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for row in (*train_rows, *held_out_rows)
    )
    # Where the weights are split, all processes have to call the model equally often.
    row_tokens = 0 if processes.sharded() else row_limit(policy, longest)
    if not processes.sharded():
        collator = PackedCollator(collator, row_tokens)
    adapter = {n: p.detach().clone() for n, p in policy.model.named_parameters() if p.requires_grad}
    with (
        quiet_transformers(),
        warnings.catch_warnings(action="ignore"),
        row_attention(policy.model, shared=row_tokens > 0),
    ):
        with _explained_refusals("the trainer refuses these dpo settings"):
            trainer = ReadyDataTrainer(
                model=policy.model,
                args=_arguments(policy, config, folder, seed, bool(held_out_rows), done > 0),
                train_dataset=Dataset.from_list(list(train_rows)),
                eval_dataset=Dataset.from_list(list(held_out_rows)) if held_out_rows else None,
                processing_class=policy.tokenizer,
                data_collator=collator,
                pieces=PieceBatches(train_rows, collator, config, seed),
            )
        # TRL rounds the adapter of a quantized model to bfloat16, where small steps are lost.
        for name, weights in adapter.items():
            policy.model.get_parameter(name).data = weights
        if not processes.sharded():  # there, the weights are split first
            with _explained_refusals(f"dpo.optimizer={config.optimizer} cannot be used here"):
                trainer.create_optimizer()
        trainer.remove_callback(PrinterCallback)  # _Watch shows what matters
        trainer.add_callback(_Watch(config, trackers, progress and processes.is_main()))
        trainer.train(resume_from_checkpoint=checkpoint)
    policy.model.eval()
    return _log_rows(trainer.state.log_history)


@contextmanager
def _explained_refusals(what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, ImportError, NotImplementedError) as error:
        raise ConfigError(f"{what}: {error}") from error


def _last_checkpoint(folder: Path) -> tuple[int, str | None]:
    """Return (steps, folder) of the newest checkpoint; remove those that were left half-written."""
    whole: dict[int, str | None] = {0: None}
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).is_file():
            whole[int(path.name.removeprefix("checkpoint-"))] = str(path)
        else:
            shutil.rmtree(path)
    return max(whole.items())


def _arguments(
    policy: Policy, config: DPOConfig, folder: Path, seed: int, evaluates: bool, resumed: bool
) -> TRLConfig:
    model = unwrapped(policy.model)
    if config.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"dpo.gradient_checkpointing: a {type(model).__name__} cannot recompute its "
            "activations; set it to false"
        )
    piece = piece_size(config, processes.size())
    on_cpu = policy.device.type == "cpu"
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
        per_device_train_batch_size=piece,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // (piece * processes.size()),
        gradient_checkpointing=config.gradient_checkpointing,
        max_length=None,  # the pairs were measured and chosen already
        router_aux_loss_coef=0.0,  # a mixture of experts has the loss of DPO alone, too
        disable_dropout=False,  # it would switch off lora.dropout, too
        # The weights are in the compute type already; autocast would only convert them again.
        bf16=False,
        # float16 loses small gradients unless the loss is scaled, which comes with autocast.
        fp16=policy.config.dtype == "float16" and not on_cpu,
        use_cpu=on_cpu,
        # A row more in one process must not leave another waiting for its buffers.
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
        seed=seed,
        logging_steps=config.log_every,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.evaluate_every,
        eval_on_start=evaluates and not resumed,  # a resumed round has measured that already
        save_steps=config.save_every,
        save_total_limit=2,
        report_to="none",  # _Watch calls the trackers
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:  # one process uses one GPU; a launcher starts a process for each
        arguments._n_gpu = 1
    return arguments


class _Watch(TrainerCallback):
    """Progress bar, trackers, marks of whole checkpoints, and a stop where training fails."""

    def __init__(self, config: DPOConfig, trackers: Sequence[GeneralTracker], progress: bool):
        self.config, self.trackers = config, trackers
        self.bar = tqdm(total=config.steps, desc="DPO", unit="step", disable=not progress)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        activate_adapters(model, trainable=True)  # reading a checkpoint leaves the top one alone
        settings = {"args": args.to_json_string(), "model_config": model.config.to_json_string()}
        for tracker in self.trackers:
            tracker.log(settings)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for key in ("loss", "grad_norm", "eval_loss"):
            value = float(logs.get(key, 0.0))
            if not math.isfinite(value):
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
        for tracker in self.trackers:
            tracker.log(rewrite_logs(logs), step=state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        processes.barrier()  # each process has its own file in it
        processes.on_main(lambda: write_json(checkpoint / COMPLETE, {"step": state.global_step}))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
        for tracker in self.trackers:
            tracker.finish()


def _log_rows(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for entry in history:
        split, prefix = ("held_out", "eval_") if "eval_loss" in entry else ("train", "")
        values = {x: float(entry[prefix + y]) for y, x in LOGGED.items() if prefix + y in entry}
        if "loss" in values:  # it is not the summary of the whole run
            row = {"step": int(entry["step"]), "split": split, **values}
            rows.setdefault((split, row["step"]), row)  # a resumed round measures a step twice
    return list(rows.values())
