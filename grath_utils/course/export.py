"""What leaves a run: a model that stands alone, with a card that says what it is and is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData

from grath_utils import __version__
from grath_utils.course.report import comparison_table
from grath_utils.engine.generation import generate
from grath_utils.engine.machine import quiet_transformers
from grath_utils.engine.models import Policy, apply_adapters, base_of, load_base
from grath_utils.errors import ModelError, UsageError
from grath_utils.files import atomic_path, check_new_folder, user_path, write_text
from grath_utils.loop.named_models import resolve_name
from grath_utils.loop.run_dir import Run, load_run
from grath_utils.loop.stages import load_model
from grath_utils.loop.state import choice_line, run_state
from grath_utils.pairs.modes import find_mode
from grath_utils.pairs.prompts import question_messages, render_chat


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
        raise ModelError(f'"{name}" has no adapter to merge: name RUN_DIR@ITERATION')
    # On a CPU the rounded weights are ordinary ones, to which a product can be added exactly.
    exact = replace(base, device="cpu", dtype="float32")
    wanted = _logits(apply_adapters(load_base(exact), adapters))
    merged = apply_adapters(load_base(exact), adapters, fold_last=True)
    merged.model.to(getattr(torch, dtype))
    path, _, iteration = name.rpartition("@")
    if path and iteration.isdigit():
        card = model_card(load_run(path), int(iteration))
    else:
        card = f"# Merged from `{Path(name).name}`\n\nMade by grath_utils {__version__}.\n"
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


def model_card(run: Run, iteration: int) -> str:
    """Return the card of a run's model as Markdown; the text is that of ``model_card.md``.

    Every number is read from the run directory; what was not measured is said to be so.
    """
    info, state = run.info(), run_state(run)
    name = info["model"]["name"]
    tags = ["grath", "dpo", "truthfulness"]
    card = ModelCard.from_template(
        ModelCardData(base_model=name, library_name="peft", tags=tags),
        template_path=str(Path(__file__).with_name("model_card.md")),
        name=run.path.name,
        round=iteration + 1,
        rounds=len(state.planned),
        config=run.config,
        info=info,
        quantization=run.quantization(),
        mode=find_mode(run.config.pairs.mode),
        comparison=comparison_table(run, "github") if iteration == state.final else "",
        choice=choice_line(run),
        version=__version__,
    )
    return str(card)


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
