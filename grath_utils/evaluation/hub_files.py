"""The files that benchmarks are made of: one name for a mirror's file and for a split on the Hub.

A benchmark's rows come from exactly one place: the mirror that ``GRATH_MIRROR`` names, or the Hub
at a pinned revision. A file missing from a mirror is an error; nothing is fetched in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from grath_utils.errors import DataError, FetchError
from grath_utils.files import mirror_dir, read_jsonl


@dataclass(frozen=True)
class HubFile:
    """One split of a Hub data set and its place in a mirror."""

    path: str
    """Relative to the mirror."""
    dataset: str
    config: str | None
    split: str
    revision: str


_TRUTHFULQA = ("truthfulqa/truthful_qa", "741b8276f2d1982aa3d5b832d3ee81ed3b896490")
_ARC = ("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453")
_HELLASWAG = ("Rowan/hellaswag", "218ec52e09a7e7462a5400043bb9a69a41d06b76")
_MMLU = ("cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe")

MMLU_SUBJECTS = (
    "abstract_algebra",
    "anatomy",
    "astronomy",
    "business_ethics",
    "clinical_knowledge",
    "college_biology",
    "college_chemistry",
    "college_computer_science",
    "college_mathematics",
    "college_medicine",
    "college_physics",
    "computer_security",
    "conceptual_physics",
    "econometrics",
    "electrical_engineering",
    "elementary_mathematics",
    "formal_logic",
    "global_facts",
    "high_school_biology",
    "high_school_chemistry",
    "high_school_computer_science",
    "high_school_european_history",
    "high_school_geography",
    "high_school_government_and_politics",
    "high_school_macroeconomics",
    "high_school_mathematics",
    "high_school_microeconomics",
    "high_school_physics",
    "high_school_psychology",
    "high_school_statistics",
    "high_school_us_history",
    "high_school_world_history",
    "human_aging",
    "human_sexuality",
    "international_law",
    "jurisprudence",
    "logical_fallacies",
    "machine_learning",
    "management",
    "marketing",
    "medical_genetics",
    "miscellaneous",
    "moral_disputes",
    "moral_scenarios",
    "nutrition",
    "philosophy",
    "prehistory",
    "professional_accounting",
    "professional_law",
    "professional_medicine",
    "professional_psychology",
    "public_relations",
    "security_studies",
    "sociology",
    "us_foreign_policy",
    "virology",
    "world_religions",
)


def _file(path: str, hub: tuple[str, str], config: str | None, split: str) -> HubFile:
    dataset, revision = hub
    return HubFile(f"{path}.jsonl", dataset, config, split, revision)


MULTIPLE_CHOICE = _file(
    "truthful_qa/multiple_choice/validation", _TRUTHFULQA, "multiple_choice", "validation"
)
GENERATION = _file("truthful_qa/generation/validation", _TRUTHFULQA, "generation", "validation")
ARC_TRAIN = _file("ai2_arc/ARC-Challenge/train", _ARC, "ARC-Challenge", "train")
ARC_TEST = _file("ai2_arc/ARC-Challenge/test", _ARC, "ARC-Challenge", "test")
HELLASWAG = _file("hellaswag/validation", _HELLASWAG, None, "validation")
HELLASWAG_TRAIN = _file("hellaswag/train", _HELLASWAG, None, "train")
MMLU = {
    subject: tuple(_file(f"mmlu/{subject}/{s}", _MMLU, subject, s) for s in ("dev", "test"))
    for subject in MMLU_SUBJECTS
}
FILES: tuple[HubFile, ...] = (
    MULTIPLE_CHOICE,
    GENERATION,
    ARC_TRAIN,
    ARC_TEST,
    HELLASWAG,
    HELLASWAG_TRAIN,
    *(file for pair in MMLU.values() for file in pair),
)
"""Everything that a mirror holds."""


def read_rows(file: HubFile) -> list[dict[str, Any]]:
    """Return the rows of a file from the mirror, if there is one, and from the Hub otherwise.

    Raises:
        DataError: the mirror lacks the file, or the file is not JSONL.
        FetchError: the Hub cannot be reached.
    """
    mirror = mirror_dir()
    if mirror is None:
        return list(hub_rows(file))
    path = mirror / file.path
    if not path.is_file():
        raise DataError(
            f"the mirror {mirror} (GRATH_MIRROR) has no {file.path}; add it with "
            "`python -m grath_utils mirror --to DIR`, or unset GRATH_MIRROR to use the Hub"
        )
    return read_jsonl(path)


def hub_rows(file: HubFile) -> Iterable[dict[str, Any]]:
    """Download (or take from the Hub's cache) one split, at its pinned revision."""
    from datasets import load_dataset

    try:
        return load_dataset(file.dataset, file.config, split=file.split, revision=file.revision)
    except Exception as error:  # datasets raises a different kind for each way to be offline
        reason = str(error).strip().splitlines()
        raise FetchError(
            f"{file.dataset} cannot be fetched from the Hub "
            f"({reason[0] if reason else type(error).__name__}). Without network there are two "
            "ways: set GRATH_MIRROR to a benchmark mirror (made elsewhere with "
            "`python -m grath_utils mirror --to DIR`), or measure on our own data, `--benchmark "
            "probe`"
        ) from error


def in_mirror(file: HubFile, *, default: bool) -> bool:
    """Tell whether the mirror holds a file; ``default`` where there is no mirror."""
    mirror = mirror_dir()
    return default if mirror is None else (mirror / file.path).is_file()


def source_of(file: HubFile) -> str:
    """Return in words where :func:`read_rows` takes the file from."""
    mirror = mirror_dir()
    return f"mirror {mirror.name}" if mirror else f"Hub {file.dataset}@{file.revision[:8]}"
