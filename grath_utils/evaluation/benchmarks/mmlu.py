"""MMLU (Hendrycks et al. 2021, arXiv 2009.03300): examinations in 57 subjects."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from grath_utils.evaluation.benchmarks.base import (
    BenchmarkSize,
    BenchmarkSpec,
    Item,
    Loaded,
    Protocol,
    Row,
    gold_labels,
    make_item,
    read_items,
    short_id,
)
from grath_utils.evaluation.benchmarks.hub_files import HubFile
from grath_utils.evaluation.metrics import accuracy_metrics

SUBJECTS = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology
    college_chemistry college_computer_science college_mathematics college_medicine
    college_physics computer_security conceptual_physics econometrics electrical_engineering
    elementary_mathematics formal_logic global_facts high_school_biology high_school_chemistry
    high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics
    high_school_microeconomics high_school_physics high_school_psychology high_school_statistics
    high_school_us_history high_school_world_history human_aging human_sexuality
    international_law jurisprudence logical_fallacies machine_learning management marketing
    medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy
    prehistory professional_accounting professional_law professional_medicine
    professional_psychology public_relations security_studies sociology us_foreign_policy
    virology world_religions
""".split()
LETTERS = "ABCDEFGHIJ"

_file = partial(HubFile, "cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe")
DEV = {s: _file(s, "dev", f"mmlu/{s}/dev.jsonl") for s in SUBJECTS}
TEST = {s: _file(s, "test", f"mmlu/{s}/test.jsonl") for s in SUBJECTS}


def _parse(subject: str, row: Row) -> Item:
    question, choices = row["question"], row["choices"]
    labels = gold_labels(row["answer"], len(choices))
    id_ = f"{subject}-{short_id(question, choices)}"
    return make_item(id_, question, choices, labels, category=subject)


def _load() -> Loaded:
    shots, items = {}, []
    for subject in SUBJECTS:
        parse = partial(_parse, subject)
        shots[subject] = read_items(DEV[subject], parse)
        items += read_items(TEST[subject], parse)
    return Loaded(tuple(replace(item, position=i) for i, item in enumerate(items)), shots)


def _heading(item: Item) -> str:
    subject = (item.category or "").replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


def _lettered(item: Item) -> str:
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, item.choices, strict=False)]
    return "\n".join([item.question.strip(), *lines, "Answer:"])


_ZERO_SHOT = Protocol(
    "zero-shot",
    "no shots, the letter of the answer",
    _lettered,
    answer=lambda item, choice: " " + LETTERS[choice],
    before=_heading,
)
_FIVE_SHOTS = replace(
    _ZERO_SHOT, name="lm-eval", about="5 shots of the subject, the letter", shots=5, draw="first"
)

MMLU = BenchmarkSpec(
    name="mmlu",
    about="examinations in 57 subjects, 5 shots",
    load=_load,
    protocols=(_FIVE_SHOTS, _ZERO_SHOT),
    metrics=("acc",),
    score=accuracy_metrics,
    size=BenchmarkSize(items=14042, tokens=176, predicted=1),
    files=tuple(file for s in SUBJECTS for file in (DEV[s], TEST[s])),
)
