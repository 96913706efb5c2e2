"""What leaves a run: adapter, merged model and pairs, each with a card that says what it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from grath_utils import __version__
from grath_utils.config import OWN_QUESTIONS, ModelConfig
from grath_utils.course.report import comparison_table
from grath_utils.engine.course_models import COURSE_MODELS, published
from grath_utils.engine.generation import generate
from grath_utils.engine.machine import quiet_transformers
from grath_utils.engine.models import Policy, apply_adapters, base_of, load_base, merged_before
from grath_utils.errors import ModelError, UsageError
from grath_utils.evaluation.benchmarks import find_benchmark
from grath_utils.files import atomic_path, check_new_folder, user_path, write_text
from grath_utils.loop.named_models import resolve_name
from grath_utils.loop.run_dir import Run, load_run, model_label
from grath_utils.loop.stages import load_model
from grath_utils.loop.state import RunState, choice_line, run_state
from grath_utils.pairs.modes import find_mode
from grath_utils.pairs.preferences import FORMS
from grath_utils.pairs.prompts import question_messages, render_chat

MADE_BY = f"Made by grath_utils {__version__}"


def merge_model(name: str, folder: Path, *, dtype: str = "float32") -> float:
    """Write a model with all of its adapters folded in as a plain model folder, with a card.

    The base is what the adapter was trained on: where that was quantized, its *rounded* weights,
    as ordinary numbers; so the merged model is the one that was measured. A ``dtype`` of 16 bits
    halves the file and rounds away part of what was learned: an adapter's product is often smaller
    than the weights' last digit.

    Returns:
        The largest difference of a logit between the model and what was written, on one prompt.

    Raises:
        ModelError: the name has no adapter, or the written model does not answer as it should.
        UsageError: the folder is not empty.
    """
    folder = user_path(folder)
    check_new_folder(folder)
    if folder == Path.cwd().resolve():
        raise UsageError(f"{folder} is where you are; name a new folder for the merged model")
    base, adapters = resolve_name(name)
    if not adapters:
        raise ModelError(f'"{name}" has no adapter to merge: name RUN_DIR@N (@0: after round 1)')
    # On a CPU the rounded weights are ordinary ones, to which a product can be added exactly.
    exact = replace(base, device="cpu", dtype="float32")
    wanted = _logits(apply_adapters(load_base(exact), adapters))
    merged = apply_adapters(load_base(exact), adapters, fold_last=True)
    merged.model.to(getattr(torch, dtype))
    path, _, iteration = name.rpartition("@")
    if path and iteration.isdigit() and not user_path(name).exists():
        card = model_card(load_run(path), int(iteration), merged=True)
    else:
        head = _metadata(base, merged=True).to_yaml()
        card = f"---\n{head}\n---\n\n# Merged from `{Path(name).name}`\n\n{MADE_BY}.\n"
    with atomic_path(folder) as partial, quiet_transformers():
        merged.model.save_pretrained(partial, safe_serialization=True)
        merged.tokenizer.save_pretrained(partial)
        write_text(partial / "README.md", card)
    written = load_base(replace(exact, name=str(folder), quantization="none", revision=None))
    difference = (_logits(written) - wanted).abs().max().item()
    if not difference < 0.2 * wanted.std():  # a wrong merge is off by as much as the logits vary
        raise ModelError(
            f"{folder} was written, but its logits differ by up to {difference:.2f} from those of "
            f"{name}: do not use it"
        )
    return difference


@torch.inference_mode()
def _logits(policy: Policy) -> torch.Tensor:
    prompt = "Q: What is made of milk?\nA:"
    ids = policy.tokenizer(prompt, return_tensors="pt")["input_ids"].to(policy.device)
    return policy.model(ids, use_cache=False).logits[0, -1].float().cpu()


def on_hub(base: ModelConfig) -> bool:
    """Return True for a base model that others find by its name: a course model or a Hub id."""
    return not Path(published(base).name).is_absolute()  # a found folder has its whole path


def _metadata(base: ModelConfig, *, merged: bool, **more: Any) -> ModelCardData:
    """Return a card's front matter, by which the Hub and its tools find base, library and use."""
    own = COURSE_MODELS.get(base.name)
    return ModelCardData(
        base_model=published(base).name if on_hub(base) else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        language="en",
        license=own and own.licence,
        tags=["grath", "dpo", "truthfulness"],
        **more,
    )


def model_card(run: Run, iteration: int, merged: bool = False, repository: str = "") -> str:
    """Return the card of a run's model as Markdown; the text is that of ``model_card.md``.

    Every number is read from the run directory; what was not measured is said to be so.

    Args:
        run, iteration: whose model.
        merged: the card is that of a model which stands alone, not of an adapter.
        repository: where the model is found on the Hub, once it is there.
    """
    info, state, base = run.info(), run_state(run), run.base_model()
    measured = _eval_results(state, iteration)
    named = {"model_name": run.path.name, "eval_results": measured} if measured else {}
    card = ModelCard.from_template(
        _metadata(base, merged=merged, **named),
        template_path=str(Path(__file__).with_name("model_card.md")),
        name=run.path.name,
        round=iteration + 1,
        rounds=len(state.planned),
        config=run.config,
        info=info,
        questions=_without_folders(info["questions"]["source"]),
        merged=merged,
        stands_on=merged_before(run.adapter(iteration)),
        place=repository or "FOLDER",
        base=_without_folders(published(base).name),
        course_model=base.name in COURSE_MODELS,
        quantization=run.quantization(),
        mode=find_mode(run.config.pairs.mode),
        measured=measured,
        comparison=comparison_table(state, "github") if iteration == state.final else "",
        choice=choice_line(state),
        version=__version__,
    )
    return str(card)


def pairs_card(run: Run, iteration: int, counts: Mapping[str, int], repository: str) -> str:
    """Return the card of a run's pairs as a data set; the text is that of ``pairs_card.md``.

    Args:
        run, iteration: whose pairs.
        counts: how many there are of each split.
        repository: where the data set is found on the Hub.
    """
    config = run.config
    files = {
        form: [{"split": s, "path": f"{form}/{s}.jsonl"} for s, n in counts.items() if n]
        for form in FORMS
    }
    card = DatasetCard.from_template(
        DatasetCardData(
            # What a model wrote to our own questions is as free as they are.
            license="cc0-1.0" if config.questions.source in OWN_QUESTIONS else None,
            language="en",
            task_categories=["question-answering", "text-generation"],
            tags=["grath", "dpo", "truthfulness", "synthetic"],
            pretty_name=f"Pairs of {run.path.name}, round {iteration + 1}",
            configs=[
                {"config_name": form, "data_files": each, **({} if i else {"default": True})}
                for i, (form, each) in enumerate(files.items())
            ],
        ),
        template_path=str(Path(__file__).with_name("pairs_card.md")),
        round=iteration + 1,
        config=config,
        counts=counts,
        base=_without_folders(published(run.base_model()).name),
        questions=_without_folders(run.info()["questions"]["source"]),
        mode=find_mode(config.pairs.mode),
        repository=repository,
        made_by=MADE_BY,
    )
    return str(card)


def _without_folders(text: str) -> str:
    """Return a text without this machine's folders, which mean nothing to others."""
    words = text.split(" ")
    return " ".join(Path(word).name if Path(word).is_absolute() else word for word in words)


def _eval_results(state: RunState, iteration: int) -> list[EvalResult]:
    """Return what a round was measured at, in percent, as the Hub lists it."""
    label, found = model_label(iteration), []
    for name, models in state.results.items():
        files = find_benchmark(name).files
        for metric, value in models.get(label, {"metrics": {}})["metrics"].items():
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=files[0].dataset if files else f"grath_utils/{name}",
                    dataset_name=f"{name}, {models[label]['n']} items",
                    metric_type=metric,
                    metric_value=round(100 * value["value"], 2),
                )
            )
    return found


def ask_both(run: Run, *, max_new_tokens: int = 60) -> Callable[[str], tuple[str, str]]:
    """Return a function: from a question to the base model's answer and the trained one's, greedy.

    The trained model is the chosen round's; before the rounds are measured, the last one trained.

    Raises:
        UsageError: no round has been trained yet.
    """
    trained = [t for t in range(run.config.loop.iterations) if run.adapter(t).is_dir()]
    if not trained:
        raise UsageError(f"{run.path}: no round has been trained yet, so there is one model only")
    final = run_state(run).final
    policy = load_model(run, final if final in trained else trained[-1])
    base = load_model(run, None) if policy.folded else None

    def written(model: Policy, question: str) -> str:
        prompt = render_chat(model.tokenizer, question_messages(question))
        return generate(model, [prompt], max_new_tokens=max_new_tokens)[0].text.strip()

    def answer(question: str) -> tuple[str, str]:
        with base_of(policy, base) as model:
            before = written(model, question)
        return before, written(policy, question)

    return answer
