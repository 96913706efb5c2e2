"""MMLU (Hendrycks et al. 2021, arXiv 2009.03300): examinations in 57 subjects."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from grath_utils.evaluation.benchmarks import base
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

_file = partial(base.HubFile, "cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe")
DEV = {subject: _file(subject, "dev") for subject in SUBJECTS}
TEST = {subject: _file(subject, "test") for subject in SUBJECTS}


def _parse(subject: str, row: base.Row) -> base.Item:
    id_ = f"{subject}-{base.short_id(row['question'], row['choices'])}"
    return base.choice_item(id_, row["question"], row["choices"], row["answer"], subject)


def _load() -> base.Loaded:
    shots, items = {}, []
    for subject in SUBJECTS:
        parse = partial(_parse, subject)
        shots[subject] = base.read_items(DEV[subject], parse)
        items += base.read_items(TEST[subject], parse)
    return base.Loaded(tuple(replace(item, position=i) for i, item in enumerate(items)), shots)


def _heading(item: base.Item) -> str:
    subject = (item.category or "").replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


def _lettered(item: base.Item) -> str:
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, item.choices, strict=False)]
    return "\n".join([item.question.strip(), *lines, "Answer:"])


_ZERO_SHOT = base.Protocol(
    "zero-shot",
    "no shots, the letter of the answer",
    _lettered,
    answer=lambda item, choice: " " + LETTERS[choice],
    before=_heading,
)
_FIVE_SHOTS = replace(
    _ZERO_SHOT, name="lm-eval", about="5 shots of the subject, the letter", shots=5, draw="first"
)

MMLU = base.BenchmarkSpec(
    name="mmlu",
    about="examinations in 57 subjects, 5 shots",
    load=_load,
    protocols=(_FIVE_SHOTS, _ZERO_SHOT),
    metrics=("acc",),
    score=accuracy_metrics,
    size=base.BenchmarkSize(items=14042, tokens=176, predicted=1),
    files=tuple(file for s in SUBJECTS for file in (DEV[s], TEST[s])),
)
