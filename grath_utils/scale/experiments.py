"""The live experiment of notebook 5: rounds beside a run, each on pairs of the reader's choice.

The folder of a round, in ``RUN/what_matters``, is named by all that the round depends on: it is
found again where nothing has changed, and never taken for another.
"""

from __future__ import annotations

from collections.abc import Sequence

from grath_utils.config import DPOConfig, LoraConfig, ModelConfig, own_settings
from grath_utils.dpo.adapters import model_after
from grath_utils.dpo.round import train_round
from grath_utils.engine.models import Policy, resolve
from grath_utils.files import fingerprint
from grath_utils.loop.run_dir import Run
from grath_utils.pairs.generate import Pair


def trained_beside(
    run: Run,
    pairs: Sequence[Pair],
    *,
    model: ModelConfig,
    dpo: DPOConfig,
    lora: LoraConfig,
    seed: int,
) -> Policy:
    """Return a model after one round on ``pairs``: trained now, or as an earlier call left it.

    Raises as :func:`.train_round`.
    """
    base = resolve(model)
    settings = [own_settings(section) for section in (base, dpo, lora)]
    rows = [pair.to_row() for pair in pairs]
    folder = run.path / "what_matters" / fingerprint([settings, rows, seed])
    adapter = folder / "adapter"
    if not adapter.is_dir():
        train_round(base, pairs, (), folder, dpo=dpo, lora=lora, seed=seed)
    return model_after(base, adapter).load()
