"""Models by the names that users give: `default`, a Hub id, a folder, or a round of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from grath_utils.config import ModelConfig
from grath_utils.engine.models import (
    DEFAULT_MODEL,
    Policy,
    adapter_base,
    apply_adapters,
    load_base,
    merged_before,
)
from grath_utils.errors import ModelError
from grath_utils.loop.run_dir import load_run


def load_policy(
    name: str = DEFAULT_MODEL,
    *,
    quantization: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
) -> Policy:
    """Load a model by the name that users give, see :func:`resolve_name`.

    What is left out is as the run recorded it for ``RUN_DIR@ITERATION``, and otherwise as
    :class:`.config.ModelConfig` has it. Without a GPU the 4-bit types of ``quantization`` are
    *simulated*: the weights are rounded through bitsandbytes' own tables and kept in ``dtype``,
    the same numbers as QLoRA without its memory saving.

    Raises:
        ModelError: no such model, or the adapter belongs to another base model.
        FetchError: the default model is neither in the cache nor downloadable.
        UsageError: the device or the quantization is not available here.
    """
    base, adapters = resolve_name(name)
    given = {"quantization": quantization, "dtype": dtype, "device": device, "revision": revision}
    policy = load_base(replace(base, **{k: v for k, v in given.items() if v is not None}))
    if adapters:
        policy = apply_adapters(policy, adapters)
    return replace(policy, name=name)


def resolve_name(name: str) -> tuple[ModelConfig, list[Path]]:
    """Return the base model and the adapters (to merge in order, the last on top) of a name.

    A name is ``default``, a Hub id (``org/model``), a model folder, an adapter folder, or
    ``RUN_DIR@ITERATION``: ``runs/cpu@1`` is the model after the second DPO round, ``runs/cpu@base``
    the one before the first.

    Raises:
        ModelError: the name is that of a run or an adapter which is not there or not whole.
    """
    if "@" not in name or Path(name).exists():
        folder = Path(name).expanduser()
        if (folder / "adapter" / "adapter_config.json").is_file():
            folder = folder / "adapter"  # an iteration's folder, or what `train --out` left
        if (folder / "adapter_config.json").is_file():
            return adapter_base(folder), [*merged_before(folder), folder]
        return ModelConfig(name=name), []
    path, _, which = name.rpartition("@")
    run = load_run(path)
    if which == "base":
        return run.config.model, []
    if not which.isdigit():
        raise ModelError(f'"{name}": after @ comes an iteration (0, 1, ...) or `base`')
    adapter = run.adapter(int(which))
    if not adapter.is_dir():
        done = [t for t in range(run.config.loop.iterations) if run.adapter(t).is_dir()]
        trained = ", ".join(map(str, done)) or "none yet"
        raise ModelError(f'"{name}": iteration {which} has no adapter (trained so far: {trained})')
    return run.config.model, [*merged_before(adapter), adapter]
