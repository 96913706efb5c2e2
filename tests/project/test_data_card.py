"""The data card: the Hub and ``datasets`` find each file of ``data/`` by its front matter."""

from __future__ import annotations

from pathlib import Path

from datasets import get_dataset_config_names, load_dataset
from huggingface_hub import DatasetCard

DATA = Path(__file__).resolve().parents[2] / "data"


def test_each_file_is_a_configuration_that_loads(tmp_path: Path) -> None:
    card = DatasetCard.load(DATA / "README.md").data
    assert (card.license, card.language) == ("cc0-1.0", "en")
    names = get_dataset_config_names(str(DATA))
    assert sorted(names) == sorted(path.stem for path in DATA.glob("*.jsonl"))
    for config in card.configs:
        name, (files,) = config["config_name"], config["data_files"]
        assert files["path"] == f"{name}.jsonl"
        rows = load_dataset(str(DATA), name, split=files["split"], cache_dir=str(tmp_path))
        lines = (DATA / files["path"]).read_text(encoding="utf-8").splitlines()
        assert len(rows) == len(lines)
