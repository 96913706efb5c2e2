"""The policy: a base model, its quantization and adapters, loaded from wherever they are."""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from grath_utils.config import ModelConfig, config_from_dict
from grath_utils.engine import processes
from grath_utils.engine.course_models import COURSE_MODELS
from grath_utils.engine.machine import has_fast_bfloat16, keep_freed_memory, quiet_transformers
from grath_utils.engine.quantization import (
    Quantized,
    bitsandbytes_config,
    quantized_part,
    quantized_skeleton,
    round_weights,
)
from grath_utils.engine.stored import (
    architecture,
    base_weights_fingerprint,
    explained,
    load_stored,
    pinned,
)
from grath_utils.errors import ModelError, UsageError, reason_of
from grath_utils.files import cache_dir, fingerprint, fingerprint_folder, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]
ADAPTER_RECORD = "grath.json"  # beside adapter_config.json: which base and what was merged before
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")  # in config.json
TOP = "default"  # peft's name for an only adapter; TRL counts on it


@dataclass(frozen=True)
class Policy:
    """A causal language model with its tokenizer, ready to be asked, scored or trained."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str  # what was asked for: `default`, a Hub id, a folder, or RUN_DIR@N
    config: ModelConfig  # the base model, its quantization, dtype and device (no `auto`)
    fingerprint: str  # changes whenever weights, quantization, dtype or adapter do
    adapters: tuple[Path, ...] = ()  # on the base, in order: all but the last are merged into it
    quantized: Quantized | None = None  # how much of the base is, if any
    folded: bool = False  # an adapter was added to the weights, where it cannot be switched off

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def is_base(self) -> bool:
        """True where no adapter changes the base model, in its weights or beside them."""
        return not self.folded and not hasattr(self.model, "peft_config")

    @property
    def max_length(self) -> int:
        """The longest sequence in tokens that the model was made for; ``sys.maxsize``: any.

        A model without positions, such as a state-space model or one with ALiBi, has no limit of
        its own; its tokenizer may know one.
        """
        config = self.model.config.get_text_config(decoder=True)
        own = (getattr(config, name, None) for name in LENGTHS)
        known = next((length for length in own if length and length > 0), None)
        return int(known or min(self.tokenizer.model_max_length, sys.maxsize))


def load_base(config: ModelConfig) -> Policy:
    """Load the base model that ``config`` describes, without an adapter, in evaluation mode."""
    config = pinned(resolve(config))
    gc.collect()  # a model that was trained refers to itself: it would stand beside this one
    keep_freed_memory(config.device)
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    quantized, on_gpu = config.quantization != "none", config.device == "cuda"
    if quantized and on_gpu:
        options["quantization_config"] = bitsandbytes_config(config)
        options["device_map"] = {"": torch.cuda.current_device()}
    model, tokenizer = load_stored(config, **options)
    part = None
    if quantized:
        with explained("weights", config):
            part = (
                quantized_part(model)
                if on_gpu
                else round_weights(model, config.quantization, _codes_file(config))
            )
    if "device_map" not in options:
        model = model.to(config.device)
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f'the tokenizer of "{config.name}" has a vocabulary of {tokenizer.vocab_size}, and the '
            f"model has embeddings for {rows}: its tokenizer files are those of another model"
        )
    # A token that was added without an embedding does no harm, as long as nobody uses it.
    pads = [token for token in (tokenizer.pad_token, tokenizer.eos_token) if token]
    known = (token for token in pads if tokenizer.convert_tokens_to_ids(token) < rows)
    tokenizer.pad_token = next(known, None)
    model.config.use_cache = True
    # Some chat models ship sampling settings: here, each call says what it wants.
    model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    model.eval()
    identity = fingerprint([base_weights_fingerprint(config), config.quantization, config.dtype])
    return Policy(model, tokenizer, config.name, config, identity, quantized=part)


def _codes_file(config: ModelConfig) -> Path | None:
    """Return where the 4-bit codes of one of the course's models are kept; of others they are not.

    The course loads its model a dozen times.
    """
    if config.name not in COURSE_MODELS:
        return None
    library = version("bitsandbytes")
    made_of = [base_weights_fingerprint(config), config.quantization, config.dtype, library]
    return cache_dir() / "rounded" / f"{fingerprint(made_of)}.safetensors"


def part_to_quantize(config: ModelConfig) -> Quantized | None:
    """Return how much of a base model is going to be quantized, without loading its weights."""
    if config.quantization == "none":
        return None
    settings = architecture(config)
    with explained("weights", config):
        return quantized_part(quantized_skeleton(settings, config.quantization))


def resolve(config: ModelConfig) -> ModelConfig:
    """Replace ``auto`` by what this machine has; a device that is not here is a ``UsageError``."""
    device, dtype = config.device, config.dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and not processes.cpu_only() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError('device "cuda" was asked for, but torch sees no GPU; use "cpu" or "auto"')
    if device == "mps" and not torch.backends.mps.is_available():
        raise UsageError('device "mps" was asked for, but this machine has none; use "cpu"')
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bfloat16(device) else "float32"
    return replace(config, device=device, dtype=dtype)


def apply_adapters(policy: Policy, adapters: Sequence[Path], *, fold_last: bool = False) -> Policy:
    """Put adapters on a base policy, in the order in which they were trained.

    All but the last (with ``fold_last``, all) are folded into the base: their products are added to
    the weights. In a 4-bit or 8-bit layer that would round the sum again, by steps larger than most
    of what was learned; there, a folded adapter stays beside the weights, frozen: the same
    function, without the rounding. Without any, the policy is returned as it is.

    Raises:
        ModelError: an adapter is missing or damaged, or was made for another base model.
    """
    if not adapters:
        return policy
    from peft import PeftModel

    model, any_folded = policy.model, policy.folded
    for position, folder in enumerate(adapters):
        _check_adapter(folder, policy)
        folded = fold_last or position < len(adapters) - 1
        name = f"folded_{position}" if folded else TOP
        try:
            with quiet_transformers():
                if hasattr(model, "peft_config"):  # quantized: beside those that were folded
                    model.load_adapter(str(folder), adapter_name=name)
                else:
                    model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
                _check_matrices(model, name, folder)
                if folded and not getattr(model, "is_quantized", False):
                    model, any_folded = model.merge_and_unload(), True
        except ModelError:
            raise
        except Exception as error:  # peft's own, torch's, safetensors', and of wrong types
            raise ModelError(f"cannot load the adapter in {folder}: {reason_of(error)}") from error
    if hasattr(model, "peft_config"):
        activate_adapters(model, trainable=False)
    model.eval()
    identity = fingerprint([policy.fingerprint, *map(adapter_fingerprint, adapters)])
    applied = (*policy.adapters, *adapters)
    return replace(policy, model=model, fingerprint=identity, adapters=applied, folded=any_folded)


def _check_matrices(model: Any, name: str, folder: Path) -> None:
    """Refuse an adapter with other layers than its configuration names: peft only warns of them."""
    from peft import get_peft_model_state_dict

    wanted = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    with safe_open(folder / ADAPTER_FILES[1], "pt") as stored:
        found = set(stored.keys())
    missing, left = wanted - found, {key for key in found - wanted if "lora_" in key}
    if missing or left:
        raise ModelError(
            f"the adapter in {folder} does not fit: of the {len(wanted)} matrices that its "
            f"adapter_config.json asks for {len(missing)} are missing, and {len(left)} more belong "
            f"to no layer (such as {min(missing | left)})"
        )


def activate_adapters(model: Any, *, trainable: bool) -> None:
    """Let every adapter of a model take part, and only the top one train, if any does."""
    names = sorted(model.peft_config, key=lambda name: name != TOP)
    model.base_model.set_adapter(names, inference_mode=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable and f".{TOP}." in name)


@contextmanager
def base_of(policy: Policy, base: Policy | None = None) -> Iterator[Policy]:
    """Give a policy's base model: the policy itself, with its adapters switched off for a while.

    Where an adapter is folded into its weights, ``base`` is needed: that model, loaded beside it.
    """
    if base is None and policy.folded:
        raise UsageError(
            f"{policy.name}: an adapter is folded into its weights, where it cannot be switched "
            "off; load the base model as well, and pass it"
        )
    if base is not None or policy.is_base:
        yield base or policy
        return
    trained = [(p, p.requires_grad) for p in policy.model.parameters()]
    try:
        with policy.model.disable_adapter():
            yield policy
    finally:
        for parameter, was in trained:  # peft leaves its own trainable
            parameter.requires_grad_(was)


def adapter_fingerprint(folder: Path) -> str:
    """Return a hash of an adapter's weights and configuration."""
    return fingerprint_folder(folder, ADAPTER_FILES)


def adapter_base(folder: Path, configured: ModelConfig) -> ModelConfig:
    """Return the base model that an adapter folder names.

    The other settings are the ``configured`` ones where no more than its name is recorded.
    """
    record = _adapter_record(folder)
    if "model" in record:
        return config_from_dict({"model": record["model"]}, where=str(folder)).model
    file, key = folder / "adapter_config.json", "base_model_name_or_path"
    made = read_json(file, {key: (str, None), "revision": (str, None)})
    if not made.get(key):
        raise ModelError(f"{file} does not name its base model")
    base = another_base(configured, made[key])
    return replace(base, revision=made.get("revision") or base.revision)


def another_base(configured: ModelConfig, name: str) -> ModelConfig:
    """Return the settings for another base model; a revision is that of one model alone."""
    same = name == configured.name
    return replace(configured, name=name, revision=configured.revision if same else None)


def merged_before(folder: Path) -> list[Path]:
    """Return the adapters that were merged into the base before this one was trained."""
    return [(folder / path).resolve() for path in _adapter_record(folder).get("merged") or []]


def _adapter_record(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_RECORD
    return read_json(path, {"merged": ([Path], None)}) if path.is_file() else {}


def _check_adapter(folder: Path, policy: Policy) -> None:
    """Refuse an adapter that is not whole or was trained on another base model."""
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise ModelError(f"{folder} is not an adapter: {name} is missing")
    record = _adapter_record(folder)
    wanted, found = record.get("base_weights"), base_weights_fingerprint(policy.config)
    if wanted and wanted != found:
        raise ModelError(
            f'the adapter in {folder} was trained on "{record.get("base")}" (weights {wanted}), '
            f'not on "{policy.config.name}" (weights {found})'
        )


def unwrapped(model: Any) -> PreTrainedModel:
    """Return the transformers model inside a PEFT wrapper (with its adapter layers in place)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepts(model: Any, *names: str) -> bool:
    """Return True if the model's forward (below any adapter) has a parameter of such a name."""
    return not set(names).isdisjoint(inspect.signature(unwrapped(model).forward).parameters)
