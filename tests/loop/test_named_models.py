"""The names of a run's rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from grath_utils.config import load_config
from grath_utils.errors import ModelError, UsageError
from grath_utils.loop.named_models import load_policy
from grath_utils.loop.run_dir import open_run


def test_run_names(tmp_path: Path, tiny_llama: Path) -> None:
    config = load_config("smoke", {"model.name": str(tiny_llama)})
    run = open_run(tmp_path / "run", config)
    assert load_policy(f"{run.path}@base").config.name == str(tiny_llama)
    with pytest.raises(ModelError, match="iteration 0 has no adapter .*none yet"):
        load_policy(f"{run.path}@0")
    with pytest.raises(ModelError, match="after @ comes an iteration"):
        load_policy(f"{run.path}@last")
    with pytest.raises(UsageError, match="holds no run"):
        load_policy(f"{tmp_path / 'elsewhere'}@0")
