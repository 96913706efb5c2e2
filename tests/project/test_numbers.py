"""Numbers in prose are those of a record: a sentence that repeats one goes stale in silence.

The tables of results in notebooks/RESULTS.md are computed here from the records in
``notebooks/appendix``. Every other number with a unit, and every interval, must be found again in
the notebook's own cells and outputs (on a page: in the records that it names), or stand in
``SOURCES`` with where it comes from. One that is found nowhere has to go, or to be measured.
"""

from __future__ import annotations

import json
import re
from math import isclose
from pathlib import Path

import pytest
from prose import ROOT, without_code
from scipy.stats import norm, ttest_1samp

from grath_utils.evaluation.statistics import holm
from grath_utils.figures import plots
from grath_utils.files import read_jsonl
from grath_utils.text import with_interval

PAGES = {
    name.rpartition("/")[2]: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "notebooks/RESULTS.md", "notebooks/RUNNING.md")
}
APPENDIX = ROOT / "notebooks" / "appendix"
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
COURSE = sorted((ROOT / "notebooks").glob("*.ipynb"))
MEASURED = read_jsonl(ROOT / "grath_utils" / "scale" / "measurements.jsonl")
FINAL = read_jsonl(APPENDIX / "recipe_final.jsonl")
CONTROLS = read_jsonl(APPENDIX / "recipe_controls.jsonl")
ARMS = read_jsonl(APPENDIX / "recipe_arms.jsonl")
LABELS = read_jsonl(APPENDIX / "recipe_labels.jsonl")
PROFILE = read_jsonl(APPENDIX / "recipe_profile.jsonl")
SEALED = read_jsonl(APPENDIX / "recipe_sealed.jsonl")
TRIALS = read_jsonl(APPENDIX / "recipe_sealed_trials.jsonl")

NUMBER = r"[+-]?\d+(?:,\d{3})*(?:\.\d+)?"
UNIT = r"%|percent|points?|nats?|s|seconds?|min|minutes?|h|hours?|times|[KMG]i?B|bits?"
CLAIM = re.compile(rf"(?<![\w.,-])({NUMBER})\s(?:{UNIT})(?![\w-])|\[({NUMBER}), ({NUMBER})\]")
POWER = 2.8016  # 1.96 + 0.84: the smallest visible change in standard errors

LEVEL, BLIND = (
    "95 % is the level of every interval",
    "question-blind rules on all 817 questions (tests/evaluation/test_blind_rules.py)",
)
SOURCES = {  # what is no measurement of this project's, or was measured elsewhere
    "README.md": {
        "93": "the size of the default model's file (engine/course_models.py)",
        "95": LEVEL,
        "90": "INSTRUCTOR.md has the plan",
    },
    "RESULTS.md": {"95": LEVEL},
    "RUNNING.md": {
        "0.2": "the size of PyTorch's package",
        **dict.fromkeys(("13", "5"), "`make run PROFILE=cpu-tiny` on two idle cores"),
        "10": "`grath run --profile paper-llama2 --dry-run`, on an H100",
    },
    "00_start_here": {"93": "the size of the default model's file", "95": LEVEL},
    "02_qlora_dpo": {"150": "e to the power of 5"},
    "03_iterative_refinement": {"95": LEVEL},
    "04_evaluation": {"36": BLIND, "52": BLIND, "63": BLIND, "55": "the paper's best 7B model"},
    "06_scaling_up": {"14": "2 bytes of 7 billion", "15": "the T4's memory as it shows up"},
    "dpo_by_hand": {"44": "log 9 / 0.05"},
    "mc_metrics_and_how_they_mislead": {"32": "float32", "46": BLIND, "63": BLIND},
    "nf4_by_hand": {"93": "the size of the default model's file"},
}


def numbers(text: str) -> list[float]:
    """Return all numbers of a text."""
    found = re.findall(rf"(?<![\w.]){NUMBER}", text)
    return [float(number.replace(",", "")) for number in found]


def unbacked(text: str, known: list[float], named: dict[str, str]) -> list[str]:
    """Return the claims in a text that no known number (or share, as percent) rounds to."""
    missing = []
    for match in CLAIM.finditer(without_code(text)):
        for claim in filter(None, match.groups()):
            value, digits = float(claim.replace(",", "")), len(claim.partition(".")[2])
            sizes = known if claim[0] in "+-" else map(abs, known)
            rounded = (round(x * scale, digits) for x in sizes for scale in (1, 100))
            if claim not in named and not any(isclose(r, value) for r in rounded):
                missing.append(
                    f"{claim} in: {match.string[max(0, match.start() - 60) : match.end()]}"
                )
    return missing


def cells(path: Path, kind: str) -> list[dict]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def own_numbers(path: Path) -> list[float]:
    """Return the numbers in a notebook's code and in the texts that it shows."""
    texts = []
    for cell in cells(path, "code"):
        texts += cell["source"]
        for output in cell["outputs"]:
            shown = {"text": output.get("text", []), **output.get("data", {})}
            texts += [t for kind, lines in shown.items() if kind.startswith("text") for t in lines]
    return numbers("\n".join(texts))


def records(text: str) -> list[float]:
    """Return the numbers of those records in the appendix that a notebook or page names."""
    named = [p for p in APPENDIX.glob("recipe_*.jsonl") if p.name in text]
    return numbers("\n".join(p.read_text(encoding="utf-8") for p in named))


def cost(path: Path) -> tuple[float, float]:
    """Return what the run behind a notebook's outputs took: seconds, and memory in GB."""
    stamp = json.loads(path.read_text(encoding="utf-8"))["metadata"]["grath"]["cost"]
    return stamp["seconds"], stamp["peak_memory_gib"] * 2**30 / 1e9


# --- tables of results ---------------------------------------------------------------------------


def p_value(row: dict) -> float:
    """Return a row's p-value by the normal distribution, from its smallest visible change."""
    return 2 * norm.sf(abs(row["change"]) / (row["smallest_detectable"] / POWER))


def result_table(recipe: str, change: str) -> str:
    """Return the table of a recipe, as its record has it."""
    shown = {
        ("truthfulqa_mc", "mc1"): ("TruthfulQA MC1", "no"),
        ("truthfulqa_mc", "mc2"): ("TruthfulQA MC2", "no"),
        ("probe", "mc1"): ("our probe MC1", "**yes**"),
        ("probe", "mc2"): ("our probe MC2", "**yes**"),
        ("arc_unseen", "acc"): ("unseen ARC questions", "no"),
        ("retention", "acc"): ("retention", "**yes**"),
    }
    rows = {(r["benchmark"], r["metric"]): r for r in FINAL if r["recipe"] == recipe}
    rows = {key: rows[key] for key in shown if key in rows}
    adjusted = holm({key: p_value(row) for key, row in rows.items()})
    lines = [
        f"| | items | used to choose | base | {change}, 95 % interval | p, Holm |",
        "|---|---|---|---|---|---|",
    ]
    for key, row in rows.items():
        low, high = row["ci95"]
        value = f"{row['change']:+.1f} [{low:+.1f}, {high:+.1f}]"
        name, used = shown[key]
        p = "–" if used != "no" else f"{adjusted[key]:.3f}"
        lines.append(f"| {name} | {row['n']} | {used} | {row['base']:.1f} | {value} | {p} |")
    return "\n".join(lines)


def controls_table() -> str:
    """Return the table of what stands beside picked pairs."""
    lines = ["| trained on | scored by | weights | right (%), 95 % interval |", "|---|---|---|---|"]
    for r in CONTROLS:
        low, high = r["ci95"]
        value = f"{r['accuracy']:.1f} [{low:.1f}, {high:.1f}]"
        lines.append(f"| {r['pairs']} | {r['scored_by']} | {r['weights']} | {value} |")
    return "\n".join(lines)


TURNED = ("own", "25% turned round", "random", "inverted", "unjudged")
CONTROL_NAMES = {
    "random": "the coin",
    "mismatched": "another pair's question",
    "unjudged": "not judged",
}


NAMES = {arm: look[0] for arm, look in plots.ARMS.items()} | {
    "25% turned round": "a quarter turned round",
    "inverted": "all turned round",
}


def cells_of(changes: list[dict]) -> str:
    """Return changes with their intervals as the cells of a table's line."""
    return " | ".join(with_interval(r["change"], r["ci95"], "+.1f") for r in changes)


def nats_of(row: dict) -> str:
    """Return by how much the log-probability of true and of false answers changed."""
    return f"{row['nats_true']:+.1f} / {row['nats_false']:+.1f}"


def arms_table(
    arms: list[dict], order: tuple[str, ...] = ("own", "annotated", "mismatched", "random")
) -> str:
    """Return the table of arms on record: the change of each, and what it has over random."""
    shown = (("truthfulqa_mc", "mc1"), ("truthfulqa_mc", "mc2"), ("probe_testing", "mc1"))
    shown += (("probe_testing", "mc2"), ("retention", "acc"))
    heads = "TruthfulQA MC1 | TruthfulQA MC2 | our probe MC1 | our probe MC2 | retention"
    rows = {(r["arm"], r["benchmark"], r["metric"]): r for r in arms}
    base = " | ".join(f"{rows['own', *key]['base']:.1f}" for key in shown)
    lines = [
        f"| arm | {heads} | nats | seeds |",
        "|---|" + "---|" * 7,
        f"| the model before (%) | {base} | | |",
    ]
    for arm in order:
        found = [rows[arm, *key] for key in shown if (arm, *key) in rows]
        if not found:
            continue
        changes = cells_of(found)
        moved = nats_of(found[0])
        seeds = len(found[0]["seeds"])
        lines.append(f"| {NAMES[arm]} | {changes} | {moved} | {seeds} |")
    controls = [name for name in CONTROL_NAMES if f"over_{name}" in rows["own", *shown[0]]]
    over_all = {c: [rows["own", *key][f"over_{c}"] for key in shown] for c in controls}
    tests = {(c, i): r["p"] for c, over in over_all.items() for i, r in enumerate(over) if "p" in r}
    adjusted = holm(tests)  # over all differences that are shown
    for control in controls:
        name, over = CONTROL_NAMES[control], over_all[control]
        changes = cells_of(over)
        lines.append(
            f"| **the model judges, minus {name}** | {changes} | | {len(over[0]['seeds'])} |"
        )
        if adjusted:
            values = " | ".join(f"{adjusted[control, i]:.3f}" for i in range(len(over)))
            lines.append(f"| p of that, by Holm | {values} | | |")
    return "\n".join(lines)


def arc_table() -> str:
    """Return the table of what the arms of LABELS change on questions of ARC."""
    metrics = ("acc", "acc_norm")
    rows = {(r["arm"], r["metric"]): r for r in LABELS if r["benchmark"].startswith("arc")}
    base = " | ".join(f"{rows['own', m]['base']:.1f}" for m in metrics)
    lines = [
        "| arm | ARC, accuracy | ARC, length-normalised | nats | seeds |",
        "|---|---|---|---|---|",
        f"| the model before (%) | {base} | | |",
    ]
    for arm in (*TURNED, "mismatched"):
        found = [rows[arm, m] for m in metrics]
        changes, moved, seeds = cells_of(found), nats_of(found[0]), len(found[0]["seeds"])
        lines.append(f"| {NAMES[arm]} | {changes} | {moved} | {seeds} |")
    for control, name in CONTROL_NAMES.items():
        over = [rows["own", m][f"over_{control}"] for m in metrics]
        changes, seeds = cells_of(over), len(over[0]["seeds"])
        lines.append(f"| **the model judges, minus {name}** | {changes} | | {seeds} |")
    return "\n".join(lines)


def judges_table(sealed: list[dict]) -> str:
    """Return the table of how well judges tell sealed answers apart."""
    lines = [
        "| judge | prompts a pair | questions | right of all (%) | kept (%) | right of these (%) |",
        "|---|---|---|---|---|---|",
    ]
    for r in sealed:
        kind = {"plain": "facts", "misconception": "popular errors"}[r["kind"]]
        shares = (r["right"] / r["pairs"], r["kept"] / r["pairs"], r["kept_right"] / r["kept"])
        cells = " | ".join(f"{100 * share:.0f}" for share in shares)
        lines.append(f"| `{r['judge']}` | {r['prompts_a_pair']} | {r['pairs']} {kind} | {cells} |")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("page", "table"),
    [
        ("RESULTS.md", arms_table(ARMS)),
        ("RESULTS.md", arms_table(PROFILE)),
        ("RESULTS.md", arms_table(LABELS, TURNED)),
        ("RESULTS.md", arc_table()),
        ("RESULTS.md", judges_table(SEALED)),
        ("RESULTS.md", judges_table(TRIALS)),
        ("RESULTS.md", result_table("cpu", "change after two rounds (points)")),
        ("RESULTS.md", result_table("cpu-long", "change (points)")),
        ("RESULTS.md", controls_table()),
    ],
    ids=("arms", "profile", "labels", "arc", "judges", "trials", "cpu", "cpu-long", "controls"),
)
def test_a_page_holds_the_table_as_it_is_computed(page: str, table: str) -> None:
    assert table in PAGES[page], f"{page}: put in\n{table}"


def test_what_holm_leaves_is_what_the_side_trip_says() -> None:
    rows = {(r["recipe"], r["benchmark"], r["metric"]): p_value(r) for r in FINAL}
    clear = [key for key, p in holm(rows).items() if p < 0.05]
    assert len(rows) == 61
    assert clear == [(recipe, "arc_unseen", "acc") for recipe in ("cpu-long", "strong, annotated")]


def test_what_holm_leaves_of_the_matched_pairs_is_what_notebook_5_says() -> None:
    """By the notebook's own cells, which pair the rounds that differ in one setting."""
    space: dict = {
        "recorded": lambda name: read_jsonl(APPENDIX / f"recipe_{name}.jsonl"),
        "Table": lambda *rows: None,
    }
    (five,) = (path for path in COURSE if path.name.startswith("05_"))
    for source in ("".join(cell["source"]) for cell in cells(five, "code")):
        if source.startswith(("record =", "def matched", "changes =")):
            exec(source, space)
    found = {
        (name, test): ttest_1samp(
            [b[test] - a[test] for a, b in space["matched"](*change)], 0
        ).pvalue
        for name, change in space["changes"].items()
        for test in space["tests"]
    }
    assert len(found) == 21
    clear = sorted(
        (name.partition(":")[0], test) for (name, test), p in holm(found).items() if p < 0.05
    )
    assert clear == [
        ("answers", "arc_dev_acc"), ("answers", "probe_mc2"), ("answers", "retention_acc"),
        ("learning rate", "probe_mc2"), ("questions", "arc_dev_acc"),
        ("training prompt", "probe_mc2"),
    ]  # fmt: skip


# --- what things cost ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_a_notebook_costs_what_its_run_took(path: Path) -> None:
    lines = PAGES["README.md"].splitlines()
    (row,) = (line for line in lines if line.startswith(f"| [{path.stem}]"))
    time, unit, memory = re.search(r"([\d.]+) (s|min), ([\d.]+) GB", row).groups()
    seconds, gb = cost(path)
    assert float(time) * (60 if unit == "min" else 1) == pytest.approx(seconds, rel=0.15)
    assert float(memory) == pytest.approx(gb, rel=0.05)
    said = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    assert memory in said[said.index("### What it costs") :]


# --- sentences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: "/".join(path.parts[-2:]))
def test_numbers_in_a_notebook_are_in_its_outputs_or_its_records(path: Path) -> None:
    known = own_numbers(path) + records(path.read_text(encoding="utf-8"))
    if path in COURSE:
        time, memory = cost(path)
        known += [round(memory, 1), time]
    text = "\n\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    text = re.sub(r"### What it costs\n.*?(?=\n#|\Z)", "", text, flags=re.DOTALL)  # tested above
    assert not unbacked(text, known, SOURCES.get(path.stem, {}))


@pytest.mark.parametrize("page", PAGES)
def test_numbers_on_a_page_are_in_records(page: str) -> None:
    # Two tables have tests of their own, above and in test_costs.py.
    tested = r"\n## (The notebooks|How long on what)\n.*?(?=\n## )"
    shown = re.sub(tested, "", PAGES[page], flags=re.DOTALL)
    known = records(PAGES[page]) + [row["measured"] for row in MEASURED]
    known += [sum(cost(path)[0] for path in COURSE if path.name < "05") / 60]
    assert not unbacked(shown, known, SOURCES[page])


def test_the_check_finds_a_number_without_a_record() -> None:
    text = "It rose by 4.0 points [-7.9, -0.2] in 61 % of the cases; see section 3."
    assert len(unbacked(text, [4.04, -7.9, 0.61], {})) == 1
    assert len(unbacked(text, [4.04, 7.9, -0.2, 0.61], {})) == 1
    assert unbacked("correlation, 2 nats", [1.4], {}) == ["2 in: correlation, 2 nats"]
    assert unbacked("correlation, 2 nats", [1.4], {"2": "known"}) == []
