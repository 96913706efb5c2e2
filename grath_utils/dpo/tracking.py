"""Logs of training and evaluation for TensorBoard, and for the other trackers that TRL knows.

TensorBoard needs no account and no network: its event files lie in the run directory, so that
``tensorboard --logdir RUN`` shows all rounds side by side. Other trackers get the training log
through TRL; whether they use the network is theirs to say. Without ``dpo.report_to`` nothing here
does anything, and nothing that it does changes a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grath_utils.engine import processes
from grath_utils.errors import ConfigError, did_you_mean

NONE = ("none",)
TENSORBOARD = "tensorboard"


def check_trackers(names: Sequence[str]) -> None:
    """Make sure that the trackers named by ``dpo.report_to`` can be used here.

    Raises:
        ConfigError: an unknown name, one that is not installed, or ``none`` beside another.
    """
    if tuple(names) == NONE:
        return
    from transformers.integrations import integration_utils as known

    valid = [*known.INTEGRATION_TO_CALLBACK, "none"]
    for name in names:
        if name not in valid:
            raise ConfigError(f'"dpo.report_to" names "{name}"{did_you_mean(name, valid)}')
        if name == "none":
            raise ConfigError(f'"dpo.report_to" names none beside others: {", ".join(names)}')
        if name not in known.get_available_reporting_integrations():
            package = "tensorboard" if name == TENSORBOARD else "its package"
            raise ConfigError(
                f'"dpo.report_to" names "{name}", which is not installed here: install {package} '
                "with pip, or leave it out"
            )


def trl_trackers(names: Sequence[str]) -> list[str] | str:
    """Return what TRL's own ``report_to`` takes: the trackers that we do not write ourselves."""
    return [name for name in names if name not in (TENSORBOARD, "none")] or "none"


def training_callbacks(names: Sequence[str], folder: Path, done: int) -> list[Any]:
    """Return the callbacks that write the training log to ``folder`` as event files.

    Args:
        names: ``dpo.report_to``.
        folder: where the event files go.
        done: steps that an interrupted round had finished; what it logged after them is replaced.
    """
    if TENSORBOARD not in names or not processes.is_main():
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)
    return [TensorBoardCallback(writer)]


def write_scalars(
    names: Sequence[str], folder: Path, values: Mapping[str, float], step: int
) -> None:
    """Add numbers to the event files in ``folder``, where TensorBoard is asked for."""
    if TENSORBOARD not in names or not processes.is_main():
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
