"""Models by the names that users give: `tiny`, `small`, a Hub id, a folder, or a round of a run."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from grath_utils.config import ModelConfig, absolute_name, is_stored_model
from grath_utils.engine.models import (
    Policy,
    adapter_base,
    another_base,
    apply_adapters,
    load_base,
    merged_before,
)
from grath_utils.errors import ModelError, UsageError
from grath_utils.loop.run_dir import Run, load_run
from grath_utils.loop.state import run_state


def load_policy(
    name: str = ModelConfig.name,
    *,
    quantization: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
) -> Policy:
    """Load a model by the name that users give, see :func:`resolve_name`.

    What is left out is as the run recorded it for ``RUN_DIR@N``, and otherwise as
    :class:`.config.ModelConfig` has it. Without a GPU the 4-bit types of ``quantization`` are
    *simulated*: the weights are rounded through bitsandbytes' own tables and kept in ``dtype``,
    the same numbers as QLoRA without its memory saving.

    Raises:
        ModelError: no such model, or the adapter belongs to another base model.
        FetchError: the model is neither in a cache nor downloadable.
        UsageError: the device or the quantization is not available here.
    """
    base, adapters = resolve_name(name)
    given = {"quantization": quantization, "dtype": dtype, "device": device, "revision": revision}
    given = {key: value for key, value in given.items() if value is not None}
    return load_named(name, replace(base, **given), adapters)


def load_named(name: str, base: ModelConfig, adapters: list[Path]) -> Policy:
    """Load a base model with adapters on it, to be called by a name."""
    return replace(apply_adapters(load_base(base), adapters), name=name)


def choose_model(
    name: str | None, configured: ModelConfig, given: Collection[str]
) -> tuple[ModelConfig, list[Path]]:
    """Return the base model and the adapters that a command works on, by one rule for all.

    That is the configured model, or the one that ``name`` names: a base model with the configured
    quantization, dtype and device, or a run's model or an adapter with those that it was made
    with. What users wrote themselves takes the place of either.

    Args:
        name: of ``--model``.
        configured: the profile's section ``model``, with what was written beside it.
        given: the keys of this section that users wrote.

    Raises:
        ModelError: as :func:`resolve_name`.
        UsageError: two models are named.
    """
    if name is None:
        return configured, []
    base, adapters = resolve_name(name, configured)
    if "name" in given and configured.name != base.name:
        raise UsageError(
            f'--model names "{name}", and --set model.name "{configured.name}": name one model'
        )
    return replace(base, **{key: getattr(configured, key) for key in given}), adapters


def resolve_name(
    name: str, configured: ModelConfig | None = None
) -> tuple[ModelConfig, list[Path]]:
    """Return the base model and the adapters (to merge in order, the last on top) of a name.

    A name is ``tiny``, a Hub id (``org/model``), a model folder, an adapter folder, or
    ``RUN_DIR@N``: ``runs/cpu@1`` is the model after the second DPO round, ``runs/cpu@base``
    the one before the first.

    Args:
        configured: the settings of a base model that brings none. Its revision is that of the
            model that it names, of no other.

    Raises:
        ModelError: the name is that of a run or an adapter which is not there or not whole.
    """
    configured = configured or ModelConfig()
    if "@" not in name or os.path.exists(os.path.expanduser(name)):
        folder = Path(os.path.expanduser(name))
        if (folder / "adapter" / "adapter_config.json").is_file():
            folder = folder / "adapter"  # a round's folder, or what `train --out` left
        if (folder / "adapter_config.json").is_file():
            return adapter_base(folder, configured), [*merged_before(folder), folder]
        return another_base(configured, absolute_name(name, is_stored_model)), []
    path, _, which = name.rpartition("@")
    if which == "base":
        return load_run(path).base_model(), []
    run, iteration = named_round(name)
    adapter = run.adapter(iteration)
    return run.base_model(), [*merged_before(adapter), adapter]


def named_round(name: str) -> tuple[Run, int]:
    """Return the run and the trained round of ``RUN_DIR@N``, or of ``RUN_DIR``.

    The latter means the round that the run shows as its result.

    Raises:
        ModelError: there is no such round, or it is not trained yet.
    """
    path, _, which = name.rpartition("@")
    if not path or os.path.exists(os.path.expanduser(name)):
        run = load_run(name)
        which = str(run_state(run).final)
    else:
        run = load_run(path)
    if not which.isdecimal():
        raise ModelError(
            f'"{name}": after @ comes `base`, or a number from 0 on (@0: the model after round 1)'
        )
    if not run.adapter(int(which)).is_dir():
        done = [f"@{t}" for t in range(run.config.loop.iterations) if run.adapter(t).is_dir()]
        raise ModelError(
            f'"{name}": round {int(which) + 1} has no adapter, @0 being the one after round 1 '
            f"(trained so far: {', '.join(done) or 'none yet'})"
        )
    return run, int(which)
