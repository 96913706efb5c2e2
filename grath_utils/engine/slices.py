"""What a model can do is tried out on a slice of it: few layers, few tokens, in float32.

The fast paths of this package feed a model rows that several sequences share. Most models compute
in such a row what they compute for a sequence alone; some do not, and do not say so: a window
counted in places of the row, positions that depend on the row's length, a state that no mask
resets. No list of names knows them all, so each loaded model is asked, by computing both. In 16
bits rounding would hide a wrong mask. Hence the slice: the first layers, as many as show each kind
of layer once, with the vocabulary cut to :data:`TOKENS` and everything in float32.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from grath_utils.engine.models import unwrapped
from grath_utils.errors import reason_of

TOKENS = 64  # the vocabulary of a slice
# Two orders of the same float32 sums differ by some 1e-6 of the logits' norm, a wrong mask or
# position by more than 1e-3.
TOLERANCE = 1e-4

# Logits of the shared row and of the plain one, (places, TOKENS) each.
Trial = Callable[[PreTrainedModel], Sequence[tuple[torch.Tensor, torch.Tensor]]]

# By model: the sizes that were tried for each question, and why they failed ("": they did not).
_answers: weakref.WeakKeyDictionary[Any, dict[str, dict[tuple[int, ...], str]]]
_answers = weakref.WeakKeyDictionary()
_said: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def why_not(model: Any, question: str, size: tuple[int, ...], trial: Trial) -> str:
    """Return why a model fails a trial of this size, or '' where it does not.

    A model passes every size below one that it passed, and fails every size above one that it
    failed, so few trials are run. Answers are kept as long as the model is. A lack of room for the
    slice says nothing of the model: it is raised as it is.
    """
    known = _answers.setdefault(unwrapped(model), {}).setdefault(question, {})
    for tried, reason in known.items():
        lower, upper = (tried, size) if reason else (size, tried)
        if all(a <= b for a, b in zip(lower, upper, strict=True)):
            return reason
    known[size] = _tried(model, trial)
    return known[size]


def say_once(model: Any, question: str, text: str) -> None:
    """Warn of a loaded model's answer to a question, unless it was warned of before."""
    said = _said.setdefault(unwrapped(model), set())
    if question not in said:
        said.add(question)
        warnings.warn(text, stacklevel=3)


@torch.inference_mode()
def _tried(model: Any, trial: Trial) -> str:
    try:
        for got, expected in trial(float_slice(model)):
            distance = float((got - expected).norm() / expected.norm())
            if not distance < TOLERANCE:  # so, and not >=, for NaN
                return f"its logits change by {distance:.1%} there"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's code raises where it is not made for this
        return f"its forward pass fails there ({reason_of(error)})"
    return ""


def float_slice(model: Any) -> PreTrainedModel:
    """Return a float32 copy of a model's first layers over :data:`TOKENS` of its tokens."""
    model = unwrapped(model)
    config = model.config.get_text_config()
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    lists = [layers for layers in lists if len(layers) == config.num_hidden_layers]
    depth = max(map(_depth, lists), default=config.num_hidden_layers)
    copies: dict[int, Any] = {}  # by id, what takes the place of a part: deepcopy's memo
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        if part is not None and id(part) not in copies:
            copies[id(part)] = _few_rows(part)
    for layers in lists:
        for part in layers[:depth].modules():
            if type(part).__module__.startswith("bitsandbytes"):  # which weights, is no matter here
                sizes = part.in_features, part.out_features, part.bias is not None
                copies[id(part)] = nn.Linear(*sizes, device=part.weight.device)
        copies[id(layers)] = nn.ModuleList(copy.deepcopy(list(layers[:depth]), copies))
    small = copy.deepcopy(model, copies).float().eval().requires_grad_(False)
    small.config.get_text_config().num_hidden_layers = depth
    return small


def plain_logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return the logits (1, T, vocabulary) of one sequence (1, T) alone: the truth of a trial."""
    return model(input_ids=ids, use_cache=False, **options).logits


def _depth(layers: nn.ModuleList) -> int:
    """Return how many of the first layers show each kind of layer at least once.

    Two layers are of one kind if their modules and these modules' own plain attributes are equal,
    apart from the number of the layer.
    """
    facts = [
        {
            (name, attribute): value
            for name, module in layer.named_modules()
            for attribute, value in [("", type(module)), *vars(module).items()]
            if isinstance(value, (bool, int, float, str, type(None), type))
        }
        for layer in layers
    ]
    numbered = [key for key in facts[0] if [f.get(key) for f in facts] == list(range(len(facts)))]
    kinds = [{k: v for k, v in fact.items() if k not in numbered} for fact in facts]
    return 1 + max(kinds.index(kind) for kind in kinds)


def _few_rows(part: nn.Module) -> nn.Module:
    """Return an embedding or output head that shares all but its weights, cut to few tokens.

    They are taken from all over the vocabulary: its first ones are often unused, and so all alike.
    """
    few = copy.copy(part)
    few._parameters = {
        name: None
        if values is None
        else nn.Parameter(values[torch.arange(TOKENS) * len(values) // TOKENS].clone(), False)
        for name, values in part._parameters.items()
    }
    if getattr(few, "padding_idx", None) is not None:
        few.padding_idx = None  # it would lie beyond
    return few
