"""The main job in the smoke profile, on the real default model, as a user starts it."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from helpers import config_for, finish, start
from safetensors.torch import load_file

from grath_utils.config import load_config
from grath_utils.course.execute import run_notebooks
from grath_utils.course.notebooks import main_line, numbered_notebooks
from grath_utils.files import data_dir, read_json, read_jsonl, write_json, write_jsonl
from grath_utils.loop.named_models import load_policy
from grath_utils.loop.run_dir import Run, load_run, lock_run
from grath_utils.loop.stages import plan_stages, start_run
from grath_utils.loop.state import run_state
from grath_utils.text import percent

pytestmark = [pytest.mark.model, pytest.mark.notebook]


def test_one_progress_line_per_notebook_then_the_report_and_the_table(smoke) -> None:
    run, out = smoke
    lines = out.splitlines()
    names = [path.stem for path in numbered_notebooks()]
    assert [path.stem for path in main_line()] == names[:6]
    assert len(lines) > len(names)
    for line, name in zip(lines, names, strict=False):
        assert re.fullmatch(rf"{name} +done in [\d.]+ (s|min), at most \d\.\d GiB of memory", line)
    assert f"Report: {run.report}" in lines
    assert any(re.match(r"probe +mc1 +16 ", line) for line in lines)
    assert any(re.match(r"retention +acc +16 ", line) for line in lines)


def test_the_run_directory_is_as_documented(smoke) -> None:
    run, _ = smoke
    assert all(stage.done for stage in plan_stages(run))
    info = run.info()
    assert info["config"] == json.loads(json.dumps(load_config("smoke").to_dict()))
    assert {"versions", "device", "model", "questions", "resolved", "seed"} <= info.keys()
    for t in range(2):
        assert read_jsonl(run.training_log(t))
        names = {path.name for path in run.adapter(t).iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors", "grath.json"}
    left = [p for p in run.path.rglob(".*") if p.name != ".lock"]
    assert left == [], "half-written files were left"
    assert not list(run.path.rglob("*.failed.ipynb"))


def test_really_generated_trained_and_evaluated(smoke) -> None:
    run, _ = smoke
    questions = {row["id"] for row in read_jsonl(run.questions)}
    assert len(questions) == 12
    pairs = read_jsonl(run.pairs(0))
    assert pairs
    assert {row["id"] for row in pairs} <= questions
    for row in pairs:
        correct, incorrect = (row[side].strip().lower() for side in ("correct", "incorrect"))
        assert correct
        assert incorrect
        assert correct != incorrect
    first_incorrect = {row["id"]: row["incorrect"] for row in pairs}
    for row in read_jsonl(run.pairs(1)):  # refinement keeps the first incorrect answer
        if row["id"] in first_incorrect:
            assert row["incorrect"] == first_incorrect[row["id"]]
    adapters = [load_file(run.adapter(t) / "adapter_model.safetensors") for t in range(2)]
    assert any((adapters[0][key] != adapters[1][key]).any() for key in adapters[0])
    for benchmark in ("probe", "retention"):
        scores = [
            [item["scores"] for item in read_json(run.evaluation(label, benchmark))["items"]]
            for label in ("base", "iter_0", "iter_1")
        ]
        assert scores[0] != scores[1] != scores[2]


def test_the_first_loss_of_the_first_round_is_ln_2(smoke) -> None:
    run, _ = smoke
    first = read_jsonl(run.training_log(0))[0]
    assert first["step"] == 0
    # bfloat16 sums differ a little between batch shapes.
    assert first["loss"] == pytest.approx(0.6931, abs=0.05)


def test_the_report_shows_the_numbers_of_the_evaluation_files(smoke) -> None:
    run, out = smoke
    page = BeautifulSoup(run.report.read_text(encoding="utf-8"), "html.parser")
    table = [[cell.text for cell in row.find_all(["td", "th"])] for row in page.find_all("tr")]
    rows = {tuple(row[:2]): row for row in table if len(row) == 6}
    for row in run_state(run).rows:
        shown = rows[(row["benchmark"], row["metric"])]
        for label, cell in (("base", shown[3]), ("iter_1", shown[4])):
            metric = read_json(run.evaluation(label, row["benchmark"]))["metrics"][row["metric"]]
            low, high = metric["ci95"]
            assert cell == f"{percent(metric['value'])} [{percent(low)}, {percent(high)}]"
            assert cell in out
    assert "data:image/png;base64," in run.report.read_text(encoding="utf-8")
    assert (run.figures / "before_after.png").is_file()


def test_the_executed_notebooks_have_outputs_and_no_error(smoke) -> None:
    run, _ = smoke
    for source in numbered_notebooks():
        notebook = nbformat.read(run.executed_notebooks / source.name, as_version=4)
        outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
        assert outputs, source.name
        assert not [o for o in outputs if o.output_type == "error"]
        pictures = [o for o in outputs if "image/png" in o.get("data", {})]
        assert pictures, f"{source.name} shows no figure"


def test_a_second_call_does_nothing_again_and_takes_the_main_line_alone(smoke) -> None:
    run, _ = smoke
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*.json*")}
    code, out, err = finish(start("run", "--profile", "smoke", "--run-dir", run.path))
    assert code == 0, err
    assert out.count("done before") == len(main_line())
    assert not re.search(r"^0[5-9]_", out, re.MULTILINE)
    assert {p: p.stat().st_mtime_ns for p in run.path.rglob("*.json*")} == before


def test_a_trained_model_loads_by_name(smoke) -> None:
    run, _ = smoke
    first, second = load_policy(f"{run.path}@0"), load_policy(f"{run.path}@1")
    assert first.fingerprint != second.fingerprint
    assert first.config.quantization == run.config.model.quantization


def shown(path: Path) -> str:
    """Return all that a notebook shows; a printed line may come from its kernel in two pieces."""
    cells = nbformat.read(path, as_version=4).cells
    outputs = [out for cell in cells for out in cell.get("outputs", [])]
    printed = (out.text for out in outputs if out.output_type == "stream")
    return "".join(printed) + path.read_text(encoding="utf-8")


def test_a_loop_that_ended_early_is_read_by_the_notebooks_as_it_is(smoke, tmp_path: Path) -> None:
    whole, _ = smoke
    early = {"loop.iterations": 3, "loop.keep": "best", "loop.early_stop": True}
    run = start_run(tmp_path / "run", load_config("smoke", early))
    shutil.copytree(whole.iteration(0), run.iteration(0))
    for name in ("base", "iter_0"):
        write_json(run.signals(name), read_json(whole.signals(name)))
    write_json(run.collapsed(1), {"reason": "the chosen answers are gone"})
    assert run_state(run).planned == range(1)
    names = ("03_iterative_refinement", "04_evaluation")
    chosen = [path for path in numbered_notebooks() if path.stem in names]
    texts = list(map(shown, run_notebooks(run, chosen, say=str)))
    assert "rounds: 1 of at most 3" in texts[0]
    assert "the chosen answers are gone" in texts[0]
    assert "rounds: 1; compared with the base below: round 1" in texts[1]
    assert "round 2 collapsed" in run.report.read_text(encoding="utf-8")


def test_the_notebooks_follow_a_run_of_picked_pairs_with_a_placebo(
    tmp_path: Path, tiny_llama: Path
) -> None:
    """Picked as in the profile ``cpu-long``, on questions with options that need no network.

    A tiny model does: that the notebooks hold on a real one is shown above.
    """
    options = [
        {"id": row["id"], "question": row["question"]}
        | {"candidates": row["choices"], "gold": row["answer"]}
        for row in read_jsonl(data_dir() / "retention.jsonl")[:12]
    ]
    write_jsonl(tmp_path / "options.jsonl", options)
    long = load_config("cpu-long")
    settings = {
        "pairs.mode": long.pairs.mode,
        "dpo.prompt_format": long.dpo.prompt_format,
        "lora.targets": list(long.lora.targets),
        "loop.placebo": True,
    }
    config = config_for(tiny_llama, tmp_path / "options.jsonl", **settings)
    run = start_run(tmp_path / "run", config)
    *_, third = run_notebooks(run, main_line()[1:-1], say=str)
    assert "placebo: trained, rounds: 2, in arms/random" in shown(third)
    assert not (run.path / "evaluation").exists(), "no test is opened before notebook 4"
    (fourth,) = run_notebooks(run, main_line()[-1:], say=str)
    assert "(the same pairs with random labels), in points: probe mc1 " in shown(fourth)
    assert all(stage.done for stage in plan_stages(run)), "the notebooks train the placebo, too"
    offered = {row["id"]: row["candidates"] for row in options}
    for t in range(2):
        for row in read_jsonl(run.pairs(t)):
            assert {row["correct"], row["incorrect"]} <= set(offered[row["id"]])
    assert "mode pick" in run.report.read_text(encoding="utf-8")


def artifacts_of(run: Run) -> dict[str, object]:
    """Return what two runs of the same configuration must have in common."""
    found: dict[str, object] = {"questions": run.questions.read_bytes()}
    for t in range(run.config.loop.iterations):
        found[f"pairs {t}"] = run.pairs(t).read_bytes()
        found[f"rejects {t}"] = run.rejects(t).read_bytes()
        found[f"log {t}"] = run.training_log(t).read_bytes()
        found[f"adapter {t}"] = (run.adapter(t) / "adapter_model.safetensors").read_bytes()
    for path in sorted((run.path / "evaluation").rglob("*.json")):
        result = read_json(path)
        found[str(path.relative_to(run.path))] = [result["metrics"], result["items"]]
    return found


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is a POSIX signal")
def test_killed_again_and_again_it_ends_the_same(smoke, tmp_path: Path) -> None:
    """Killed in the first pairs, in training and in evaluation; without notebooks; then whole."""
    arguments = ("run", "--profile", "smoke", "--run-dir", tmp_path / "run", "--no-notebooks")
    killed = 0
    moments = (("write pairs, round 1", 4.0), ("train, round 1", 6.0), ("evaluate base", 0.5))
    for stage, delay in moments:
        process = start(*arguments)
        assert process.stdout is not None
        for line in process.stdout:
            if stage in line:
                time.sleep(delay)
                break
        process.kill()
        process.communicate()
        killed += process.returncode != 0
    assert killed == 3
    code, out, err = finish(start(*arguments))
    assert code == 0, err
    assert "Report:" in out
    again, whole = artifacts_of(load_run(tmp_path / "run")), artifacts_of(smoke[0])
    assert again.keys() == whole.keys()
    for key, value in whole.items():
        assert again[key] == value, f"{key} differs from the uninterrupted run"


def test_a_second_process_on_the_same_run_stops_and_says_so(smoke) -> None:
    run, _ = smoke
    stranger = {k: v for k, v in os.environ.items() if k != "GRATH_RUN_LOCK"}
    with lock_run(run):
        code, _, err = finish(
            start("run", "--profile", "smoke", "--run-dir", run.path, env=stranger)
        )
    assert code == 1
    assert "in use by another process" in err
