"""Logs for the trackers that ``dpo.report_to`` names; ``accelerate`` knows how each is used.

TensorBoard needs no account and no network: its event files lie in the run directory, so that
``tensorboard --logdir RUN`` shows all rounds side by side. Nothing here changes a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import tracking

from grath_utils.engine import processes
from grath_utils.errors import ConfigError, did_you_mean


def check_trackers(names: Sequence[str]) -> None:
    """Make sure that the trackers named by ``dpo.report_to`` can be used here."""
    if tuple(names) == ("none",):
        return
    valid = [*tracking.LOGGER_TYPE_TO_CLASS, "none"]
    for name in names:
        if name not in valid:
            raise ConfigError(f'"dpo.report_to" names "{name}"{did_you_mean(name, valid)}')
        if name == "none":
            raise ConfigError(f'"dpo.report_to" names none beside others: {", ".join(names)}')
        if name not in map(str, tracking.get_available_trackers()):
            package = "tensorboard" if name == "tensorboard" else "its package"
            raise ConfigError(
                f'"dpo.report_to" names "{name}", which is not installed here: install {package} '
                "with pip, or leave it out"
            )


def start_trackers(
    names: Sequence[str], folder: Path, *, resumed_at: int = 0
) -> list[tracking.GeneralTracker]:
    """Check and start the trackers; whoever logs to them also finishes them.

    Those that write files write them to ``folder``. ``resumed_at`` is how many steps an interrupted
    round had finished: TensorBoard forgets later ones. Only the main process gets any.
    """
    check_trackers(names)
    started = []
    for name in names if processes.is_main() and "none" not in names else ():
        kind = tracking.LOGGER_TYPE_TO_CLASS[name]
        place = (folder.name, folder.parent) if kind.requires_logging_directory else ("grath",)
        purge = {"purge_step": resumed_at + 1} if resumed_at and name == "tensorboard" else {}
        started.append(kind(*place, **purge))
        started[-1].start()
    return started


def write_scalars(
    names: Sequence[str], folder: Path, values: Mapping[str, float], step: int
) -> None:
    """Send numbers to the trackers named by ``dpo.report_to``."""
    for tracker in start_trackers(names, folder):
        tracker.log(dict(values), step=step)
        tracker.finish()
