"""Merged models, model cards and answers side by side, on a finished tiny run."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from grath_utils.cli import main
from grath_utils.config import load_config
from grath_utils.course.export import ask_both, merge_model, model_card
from grath_utils.course.report import changed_items, summary_table, write_report
from grath_utils.errors import ModelError, UsageError
from grath_utils.evaluation import load_benchmark
from grath_utils.files import read_json, write_jsonl
from grath_utils.loop.named_models import load_policy
from grath_utils.loop.run_dir import Run
from grath_utils.loop.stages import (
    evaluate_model,
    measure,
    run_questions,
    start_run,
    train_iteration,
)
from grath_utils.loop.state import run_pairs
from grath_utils.pairs.generate import Pair


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = load_config(
        "smoke",
        {
            "model.name": str(tiny_llama),
            "model.quantization": "nf4",
            "model.dtype": "float32",
            "model.device": "cpu",
            "loop.iterations": 1,
            "dpo.learning_rate": 5e-2,
        },
    )
    run = start_run(tmp_path_factory.mktemp("runs") / "tiny", config)
    pairs = [
        Pair(q.id, q.text, f"It is {i}.", f"It was {i + 1}.", 0)
        for i, q in enumerate(run_questions(run))
    ]
    write_jsonl(run.pairs(0), [pair.to_row() for pair in pairs])
    train_iteration(run, 0, progress=False)
    return run


def test_a_merged_model_is_the_measured_one(run: Run, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "merged"
    assert main(["merge", "--model", f"{run.path}@0", "--to", str(folder)]) == 0
    assert "largest difference of a logit" in capsys.readouterr().out
    alone, measured = load_policy(str(folder), dtype="float32"), load_policy(f"{run.path}@0")
    base = load_policy(f"{run.path}@base")
    assert not hasattr(alone.model, "peft_config")
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        one, two, three = (m.model(ids).logits for m in (alone, measured, base))
    assert torch.allclose(one, two, atol=1e-4)
    assert not torch.allclose(one, three, atol=1e-2)
    assert (folder / "model.safetensors").is_file()
    assert "## Recipe" in (folder / "README.md").read_text(encoding="utf-8")


def test_an_adapter_folder_may_have_the_name_of_a_round(run: Run, tmp_path: Path) -> None:
    adapter = shutil.copytree(run.adapter(0), tmp_path / "mine@1")
    assert merge_model(str(adapter), tmp_path / "merged") < 1
    assert "Merged from `mine@1`" in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")


def test_the_report_shows_what_the_run_directory_holds(run: Run) -> None:
    new = write_report(run).read_text(encoding="utf-8")
    assert "No finished pair of evaluations yet." in new
    assert "1 of at most 1;" in new
    assert "It is 0." in new
    assert new.count("data:image/png;base64,") == 1, "the training"
    assert (run.figures / "training_0.png").is_file()


def test_only_an_empty_place_and_a_trained_model_will_do(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        merge_model(f"{run.path}@0", tmp_path)
    with pytest.raises(ModelError, match="no adapter to merge"):
        merge_model(f"{run.path}@base", tmp_path / "new")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_card_says_what_was_measured_and_what_not(run: Run) -> None:
    card = model_card(run, 0)
    assert "1 of 1 rounds of 3 steps of 4 pairs" in card
    assert "Not measured in this run." in card
    assert "benchmark text inside the prompts: none" in card
    for label in (None, 0):
        evaluate_model(run, label, progress=False)
    measured = ModelCard(model_card(run, 0))
    assert measured.data.library_name == "peft"
    assert re.search(r"^\| probe +\| mc1 +\|", measured.text, re.MULTILINE)
    assert "Not measured" not in measured.text
    measure(run, 0, progress=False)
    report = write_report(run).read_text(encoding="utf-8")
    for part in ("Before and after", "Which round, and why", "never read the question", "probe"):
        assert part in report
    assert report.count("data:image/png;base64,") == 3
    assert "| safe" not in report
    assert "&lt;t" not in report, "tables are not escaped"
    assert "chosen without a look at any benchmark" in summary_table(run)
    assert "iter_0" not in report
    assert "round 1" in report
    assert report.index('class="verdict"') < report.index("Before and after")
    assert all(escape(pair.question) in report for pair in run_pairs(run, 0)[0])


def test_the_items_that_changed_are_shown_in_full(run: Run) -> None:
    before = read_json(run.evaluation("base", "probe"))
    here = load_benchmark("probe", limit=before["limit"], seed=before["seed"])
    item, row = here.items[0], before["items"][0]
    scores = [-1.0 if i == item.gold else -9.0 for i in range(len(item.choices))]
    right = {**row, "scores": scores, "metrics": {**row["metrics"], "mc1": 1.0}}
    other = next(i for i in item.mc1 if i != item.gold)
    wrong = {**right, "metrics": {**row["metrics"], "mc1": 0.0}}
    wrong["scores"] = [0.0 if i == other else score for i, score in enumerate(scores)]
    one, two = ({**before, "items": [each, *before["items"][1:]]} for each in (wrong, right))
    gold = item.choices[item.gold]
    remark, won, lost = changed_items(one, two)
    assert won == [(item.question, item.choices[other], gold, gold)]
    assert (lost, remark.partition(" lost")[0]) == ([], "mc1: 1 won, 0")
    assert changed_items(two, one)[2] == [(item.question, gold, item.choices[other], gold)]
    assert changed_items({**one, "data_fingerprint": "x"}, two)[1:] == ([], [])


@pytest.mark.parametrize(
    ("mode", "kind", "answers"),
    [
        ("pick", "a control for GRATH", "all picked by the model"),
        ("gold", "a control for GRATH", "all annotated"),
        ("random", "a placebo for GRATH", "all drawn at random"),
    ],
)
def test_the_card_of_a_control_does_not_speak_of_own_answers(
    run: Run, mode: str, kind: str, answers: str
) -> None:
    control = replace(run.config, pairs=replace(run.config.pairs, mode=mode))
    card = model_card(replace(run, config=control), 0)
    assert kind in card
    assert answers in card
    assert "written by the model" not in card
    assert "written by the model" in model_card(run, 0)


def test_the_card_of_an_arm_says_whose_labels_they_are(run: Run) -> None:
    def card(**settings: object) -> str:
        config = replace(run.config, pairs=replace(run.config.pairs, **settings))
        return model_card(replace(run, config=config), 0)

    assert "An arm to compare with" not in card()
    assert " a judge to say: the model itself, asked for it (`letters`).\n" in card(judge="letters")
    random = card(labels="random", flipped=0.25)
    assert "\n\n**An arm to compare with, no model to use:** the labels of its pairs" in random
    assert "are `random`, and 25% of them flipped.\n\n## Base model and data" in random
    assert "written by the model" not in card(labels="annotated")


def test_the_card_says_what_the_model_was_shown(run: Run) -> None:
    paper = replace(run.config.pairs, mode="paper")
    shown = replace(paper, ground_truth=True, prompt_file="mine.yaml")
    cards = [
        model_card(replace(run, config=replace(run.config, pairs=pairs)), 0)
        for pairs in (paper, shown)
    ]
    assert ["QA primer" in card for card in cards] == [True, False]
    assert ["shown an annotated right answer" in card for card in cards] == [False, True]


def test_both_models_answer_the_same_question(run: Run, capsys) -> None:
    before, after = ask_both(run, max_new_tokens=8)("What is the sun?")
    assert before != after
    arguments = ["chat", "--run-dir", str(run.path), "--ask", "What is the sun?"]
    assert main([*arguments, "--max-new-tokens", "8"]) == 0
    shown = capsys.readouterr().out
    assert before.splitlines()[0] in shown
    assert "trained" in shown


def test_without_a_trained_round_there_is_nothing_to_compare(
    tiny_llama: Path, tmp_path: Path
) -> None:
    config = load_config("smoke", {"model.name": str(tiny_llama), "model.device": "cpu"})
    run = start_run(tmp_path / "new", config)
    with pytest.raises(UsageError, match="no round has been trained yet"):
        ask_both(run)
