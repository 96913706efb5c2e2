"""Configuration: frozen dataclasses, read from a profile and changed by overrides.

A profile is a YAML file in ``grath_utils/profiles/``. Whatever it leaves out has the default given
here, so that ``Config`` is always complete. Nothing is coerced: an unknown key, a value of the
wrong type or an impossible value is a :class:`.errors.ConfigError` that names the key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import operator
import os
import shlex
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grath_utils.errors import KIND_NAMES, ConfigError, brief, did_you_mean
from grath_utils.files import is_text, parse_yaml, read_yaml


def option(default: Any, help: str, **limits: Any) -> Any:
    """Declare a field, its help, and what it may be: ``choices``, ``ge`` (>=), ``gt``, ``le``.

    A new option says ``added=True``, and its default does what was done before there was one: what
    older versions wrote is then continued, see :func:`own_settings`. ``was`` gives values the names
    that these had there.
    """
    return field(default=default, metadata={"help": help, **limits})


# Names that mean the same in every folder; a file of such a name is reached as ./NAME.
BUILT_IN_MODELS = {"tiny": "SmolLM2-135M-Instruct", "small": "Qwen2.5-Coder-1.5B-Instruct"}
# `default` named `tiny` once. Run directories and adapters that recorded it are read as ever, and
# fingerprints go on with it.
OLD_MODEL_NAMES = {"default": "tiny"}
OWN_QUESTIONS = {"own": None, "own_science": "science", "own_everyday": "everyday"}  # -> their part
BUILT_IN_SOURCES = (*OWN_QUESTIONS, "arc_challenge", "arc_easy")


@dataclass(frozen=True)
class ModelConfig:
    """The policy's base model."""

    name: str = option(
        "tiny",
        ", ".join(f"`{name}` ({title})" for name, title in BUILT_IN_MODELS.items())
        + ", a Hub id, a local model folder, or a .gguf file",
        was={new: old for old, new in OLD_MODEL_NAMES.items()},
    )
    revision: str | None = option(None, "commit or tag of a Hub model; pin it for a real run")
    quantization: str = option(
        "none", "how the base weights are stored", choices=("none", "nf4", "fp4", "int8")
    )
    dtype: str = option(
        "auto",
        "compute type; auto = bfloat16 where the hardware multiplies it, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = option("auto", "auto = CUDA, else CPU", choices=("auto", "cpu", "cuda", "mps"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", OLD_MODEL_NAMES.get(self.name, self.name))


@dataclass(frozen=True)
class QuestionsConfig:
    """The questions that the model answers to itself; never those of the test."""

    source: str = option(
        BUILT_IN_SOURCES[0],
        "`own` or a part of it (`own_science`: school facts; `own_everyday`: popular beliefs, "
        "mostly false), `arc_challenge`, `arc_easy`, a JSONL/CSV file, or a Hub data set id",
    )
    column: str = option("question", "the column that holds the question")
    split: str = option("train", "split of a Hub data set")
    limit: int | None = option(None, "use this many questions, drawn by the seed", ge=2)
    held_out: float = option(
        0.1, "share of the questions kept from training, to measure the margin on", gt=0, le=0.5
    )
    skip_bad: bool = option(False, "skip and count unusable questions instead of stopping")


@dataclass(frozen=True)
class PairsConfig:
    """How the model writes its correct and incorrect answers."""

    mode: str = option("default", "how the pairs come about; `grath options` lists the modes")
    shots: int = option(6, "demonstrations before each question", ge=0, le=6)
    annotated: bool = option(
        False, "show all of the source's candidates, not saying which is right (not the paper's GT)"
    )
    ground_truth: bool = option(
        False,
        "mode paper: the paper's ablation GT, which shows the annotated answer and a wrong one",
        added=True,
    )
    prompt_file: str | None = option(
        None, "mode paper: a YAML file with other words and demonstrations", added=True
    )
    max_new_tokens: int = option(100, "longest completion, in tokens", ge=8)
    batch_size: int = option(64, "completions decoded together", ge=1)
    backend: str = option(
        "own",
        "what computes the completions: this program, the same in 8 bits (CPU), or a server",
        choices=("own", "int8", "server"),
    )
    server_url: str | None = option(
        None, "backend server: its address, as http://localhost:8000/v1", added=True
    )
    server_model: str | None = option(
        None, "backend server: the base model's name there, if it serves several", added=True
    )
    retry_failed: bool = option(True, "later rounds try again the questions that failed")
    fallback: str = option(
        "newest",
        "where a new correct answer fails: keep the newest one, or that of round 1",
        choices=("newest", "first"),
        added=True,
    )
    candidates: int = option(
        4, "mode default: completions for each of the two answers", ge=1, le=64
    )
    temperature: float = option(
        0.9, "mode default: of the candidates after the first, which is greedy", gt=0, le=5
    )
    filters: tuple[str, ...] = option(
        tuple(
            "cut_off empty equal near_equal question_copy other_question length_ratio non_answer "
            "repetition".split()
        ),
        "what a pair must not be; [none] switches all filters off",
    )
    self_check: bool = option(
        False, "drop a pair where the model itself finds the incorrect answer more probable"
    )
    legacy: bool = option(
        False, "mode paper: the official parser with its quirks, and no filter (to compare with)"
    )
    judge: str = option(
        "none",
        "who decides which of the two answers is true: none, as published, or the model itself; "
        "`grath options` lists the judges",
        added=True,
    )
    judge_keep: float = option(
        0.55,
        "judge: a pair is kept from this probability on that its correct answer is the true one",
        ge=0,
        le=1,
        added=True,
    )
    judge_swap: float = option(
        0.45,
        "judge: up to this probability the two answers are exchanged; between, the pair is dropped",
        ge=0,
        le=1,
        added=True,
    )
    labels: str = option(
        "own",
        "what the same pairs are trained on as: the model's own labels; random (the placebo), "
        "inverted; annotated: the sealed answers to our own questions in their place; mismatched: "
        "each pair under another pair's question, of whose answers it tells nothing",
        choices=("own", "random", "inverted", "annotated", "mismatched"),
        added=True,
    )
    flipped: float = option(
        0.0,
        "share of the labels that are then turned round, drawn by the seed",
        ge=0,
        le=1,
        added=True,
    )


@dataclass(frozen=True)
class LoraConfig:
    """The adapter (LoRA, arXiv 2106.09685)."""

    r: int = option(8, "rank of the update to each layer", ge=1)
    alpha: int = option(16, "scale: the update is multiplied by alpha / r", ge=1)
    dropout: float = option(0.0, "dropout on the adapter's input", ge=0, le=0.9)
    targets: tuple[str, ...] = option(
        ("q_proj", "k_proj", "v_proj"), "layers to adapt, by name, or [all-linear]"
    )


DPO_LOSSES = tuple(  # what TRL's DPOTrainer computes by name, as a test checks
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero "
    "apo_down discopop sft sigmoid_norm".split()
)
PROMPT_FORMATS = ("chat", "qa")


@dataclass(frozen=True)
class DPOConfig:
    """One round of direct preference optimisation (DPO, arXiv 2305.18290)."""

    beta: float = option(0.1, "strength of the pull to the reference (equation 7)", gt=0)
    loss: str = option("sigmoid", "a loss type of TRL's DPOTrainer", choices=DPO_LOSSES)
    label_smoothing: float = option(
        0.0,
        "cDPO: share of labels taken as flipped (losses sigmoid, robust, exo_pair, aot, "
        "aot_unpaired; the others take no notice)",
        ge=0,
        le=0.5,
    )
    learning_rate: float = option(5e-4, "peak learning rate", gt=0, le=1.0)
    schedule: str = option(
        "cosine", "learning-rate schedule", choices=("cosine", "linear", "constant_with_warmup")
    )
    warmup_steps: int = option(100, "steps of linear warm-up", ge=0)
    weight_decay: float = option(0.0, "AdamW's weight decay", ge=0)
    max_grad_norm: float = option(0.3, "gradients are clipped to this norm", gt=0)
    optimizer: str = option("adamw_torch", "an optimiser name of transformers' Trainer")
    batch_size: int = option(16, "pairs a step, over all devices (the global batch)", ge=1)
    micro_batch_size: int = option(4, "pairs in memory at a time on one device", ge=1)
    steps: int = option(1000, "optimiser steps in one round", ge=1)
    max_prompt_length: int = option(512, "longest prompt, in tokens", ge=8)
    max_length: int = option(1024, "longest prompt + completion, in tokens", ge=16)
    prompt_format: str = option(
        "chat",
        "how a training prompt is written: the chat template, or `Q: ... A:` as the test asks",
        choices=PROMPT_FORMATS,
    )
    reference: str = option(
        "current",
        "`current`: the model that the round starts from; `base`: the pretrained model, always",
        choices=("current", "base"),
    )
    chain: str = option(
        "continue",
        "rounds after the first: train the same adapter on, merge it and add a new one, or start "
        "afresh from the base model",
        choices=("continue", "merge", "fresh"),
    )
    max_displacement: float = option(
        300.0,
        "stop where the chosen answers have lost this many nats against the reference: they are "
        "gone, whatever the margin says",
        gt=0,
    )
    gradient_checkpointing: bool = option(False, "recompute activations to save memory")
    log_every: int = option(5, "steps between two lines of the training log", ge=1)
    report_to: tuple[str, ...] = option(
        ("none",), "trackers that get the logs too: [tensorboard], or others that accelerate knows"
    )
    evaluate_every: int = option(20, "steps between two measurements on the held-out pairs", ge=1)
    save_every: int = option(20, "steps between two checkpoints to resume from", ge=1)


@dataclass(frozen=True)
class LoopConfig:
    """The gradual part."""

    iterations: int = option(2, "DPO rounds, at most; 2 is the paper's headline", ge=1, le=100)
    later_steps: int | None = option(
        None,
        "optimiser steps of round 2 and later, whose pairs are learned faster; none: dpo.steps",
        ge=1,
        added=True,
    )
    keep: str = option(
        "best",
        "`best`: the round that held-out pairs and collapse signals choose; `last`: the last one",
        choices=("best", "last"),
    )
    early_stop: bool = option(
        True, "no further round after an alarm, or one that did not raise the held-out margin"
    )
    signals: bool = option(
        True,
        "measure every round on held-out pairs; only `keep=last` without early stopping can do "
        "without",
    )
    placebo: bool = option(
        False,
        "train the same pairs with other labels beside, in RUN_DIR/arms: the difference to them "
        "is the gain",
        added=True,
    )
    placebo_labels: tuple[str, ...] = option(
        ("random",),
        "these labels (pairs.labels): random, a coin for each pair; mismatched, the answers of "
        "another question, as true and as false, which tell nothing about this one",
        choices=("random", "mismatched"),
        added=True,
    )
    max_kl: float = option(
        1.0, "drift from the base, in nats a token on held-out pairs, that is an alarm", gt=0
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """What the model is measured on, before and after."""

    benchmarks: tuple[str, ...] = option(
        ("probe", "retention"), "benchmark names; see `grath evaluate --help`"
    )
    limit: int | None = option(None, "items of each benchmark, drawn by the seed", ge=2)
    every_iteration: bool = option(True, "evaluate after every round, not only base and last")
    batch_tokens: int = option(4096, "tokens scored together", ge=64)
    bootstrap: int = option(2000, "resamples behind each 95 % interval", ge=100)


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    profile: str = option("cpu", "name of the profile that this came from")
    seed: int = option(0, "reaches every stochastic step", ge=0, le=2**31 - 1)
    model: ModelConfig = field(default_factory=ModelConfig)
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def round_dpo(self, iteration: int) -> DPOConfig:
        """Return how an iteration is trained.

        Round 2 trains on answers that round 1 has made likely against answers that it has made
        unlikely, so that as many steps move the model much further.
        """
        steps = self.loop.later_steps
        if not (iteration and steps):
            return self.dpo
        often = min(self.dpo.evaluate_every, steps)  # at its end at least
        return dataclasses.replace(self.dpo, steps=steps, evaluate_every=often)

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested dicts and lists, as JSON and YAML hold them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def flat(self) -> dict[str, Any]:
        """Return ``{'dpo.beta': 0.1, ...}``."""
        return dict(_flatten(self.to_dict()))


def own_settings(section: Any) -> dict[str, Any]:
    """Return a configuration, or a section of one, as it goes into fingerprints.

    An added option counts only where it is not at its default: journals, caches and sweeps of older
    versions keep their identity.
    """
    settings = {}
    for each in dataclasses.fields(section):
        value = getattr(section, each.name)
        if dataclasses.is_dataclass(value):
            settings[each.name] = own_settings(value)
        elif "added" not in each.metadata or value != each.default:
            settings[each.name] = each.metadata.get("was", {}).get(value, value)
    return settings


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


PROFILES = Path(__file__).resolve().parent / "profiles"


def profile_names() -> list[str]:
    """Return the names of the profiles that come with the package."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_config(
    profile: str | Mapping[str, Any],
    overrides: str | Mapping[str, Any] | Sequence[str] = (),
    *,
    seed: int | None = None,
) -> Config:
    """Return the complete configuration of a profile with overrides applied.

    Args:
        profile: a name in ``grath_utils/profiles/``, the path of a YAML file, or what one holds.
        overrides: see :func:`parse_overrides`.
        seed: replaces the profile's seed.

    Raises:
        ConfigError: unknown profile or key, wrong type, or a value that cannot be.
    """
    if not isinstance(profile, (str, Mapping)):
        raise ConfigError(f"the profile is {brief(profile)}; expected a name such as cpu")
    tree = _read_profile(profile) if isinstance(profile, str) else dict(profile)
    known = Config().flat()
    for key, value in parse_overrides(overrides).items():
        if key not in known:
            raise ConfigError(f'unknown key "{key}" in the overrides{did_you_mean(key, known)}')
        if key == "profile":
            raise ConfigError('"profile" cannot be overridden: choose the profile itself')
        section, _, name = key.rpartition(".")
        place = tree.setdefault(section, {}) if section else tree
        if isinstance(place, dict):  # what else it may be is refused below
            place[name] = value
    if seed is not None:
        tree["seed"] = seed
    where = f'profile "{profile}"' if isinstance(profile, str) else "the settings"
    return config_from_dict(tree, where=where)


def _read_profile(profile: str) -> dict[str, Any]:
    is_file = profile.endswith((".yaml", ".yml"))
    path = Path(profile) if is_file else PROFILES / f"{profile}.yaml"
    if not is_file and profile not in profile_names():
        raise ConfigError(f'unknown profile "{profile}"{did_you_mean(profile, profile_names())}')
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        found = KIND_NAMES.get(type(tree), "nothing")
        raise ConfigError(f"{path}: expected `key: value` lines, found {found}")
    sections = Config().to_dict().keys() - {"profile", "seed"}
    empty = {name: {} for name in sections & tree.keys() if tree[name] is None}  # only a header
    return {**tree, **empty, "profile": str(path.resolve()) if is_file else profile}


def changed_settings(config: Config) -> dict[str, Any]:
    """Return the settings in which a configuration differs from its profile, the seed apart."""
    # As the profile has them: a path in it may mean nothing in another folder.
    profile = {**_read_profile(config.profile), "seed": config.seed}
    plain = build_section(Config, profile, config.profile).flat()
    return {key: value for key, value in config.flat().items() if value != plain[key]}


def parse_overrides(overrides: str | Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Return ``{'dpo.beta': 0.05}`` for ``"dpo.beta=0.05"`` (values are read as YAML).

    A list of such strings, or the mapping itself, does as well.

    Raises:
        ConfigError: a part is not ``key=value``, or a key is given twice.
    """
    if isinstance(overrides, Mapping):
        return dict(overrides)
    try:
        parts = shlex.split(overrides) if isinstance(overrides, str) else list(overrides)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"cannot read the overrides {overrides!r}: {error}") from error
    parsed: dict[str, Any] = {}
    for part in parts:
        key, sep, text = part.partition("=") if isinstance(part, str) else (part, "", "")
        if not sep or not key:
            raise ConfigError(f"expected key=value in the overrides, found {brief(part)}")
        if key in parsed:
            raise ConfigError(f'"{key}" is given twice in the overrides')
        parsed[key] = parse_yaml(text, f'"{key}"')
    return parsed


def config_from_dict(tree: Mapping[str, Any], *, where: str = "config") -> Config:
    """Build a :class:`Config` from nested mappings, checking every key, type and value.

    Raises:
        ConfigError: names ``where``, the dotted key, what was found and what is valid.
    """
    config = build_section(Config, tree, where)
    _check_together(config, where)
    model = absolute_name(config.model.name, is_stored_model)
    source = absolute_name(config.questions.source, os.path.isfile)
    prompt = config.pairs.prompt_file and absolute_name(config.pairs.prompt_file, os.path.isfile)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, name=model),
        questions=dataclasses.replace(config.questions, source=source),
        pairs=dataclasses.replace(config.pairs, prompt_file=prompt),
    )


def is_stored_model(path: str) -> bool:
    """Return True for what may be a model here: a folder, or a GGUF file."""
    return os.path.isdir(path) or (path.endswith(".gguf") and os.path.isfile(path))


def absolute_name(name: str, is_one: Callable[[str], bool]) -> str:
    """Return the path of what a name finds here, so that it is found from other folders, too.

    A built-in name, and one that finds nothing of the kind (a Hub model), is returned as it is.
    """
    path = os.path.expanduser(name)
    built_in = (*BUILT_IN_MODELS, *OLD_MODEL_NAMES, *BUILT_IN_SOURCES)
    return os.path.abspath(path) if name not in built_in and is_one(path) else name


def build_section(cls: type, tree: Any, where: str, prefix: str = "") -> Any:
    """Return a dataclass of settings or texts; what is wrong is a :class:`ConfigError`."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f'{where}: "{prefix[:-1]}" holds {brief(tree)}; expected keys below it')
    kinds = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in kinds:
            near = did_you_mean(str(key), kinds)
            raise ConfigError(f'{where}: unknown key "{prefix}{key}"{near}')
        if dataclasses.is_dataclass(kinds[key]):
            values[key] = build_section(kinds[key], value, where, f"{prefix}{key}.")
            continue
        name = f'{where}: "{prefix}{key}"'
        values[key] = _typed(value, kinds[key], name)
        if values[key] is not None:
            _check_limits(values[key], cls.__dataclass_fields__[key].metadata, name)
    for each in dataclasses.fields(cls):
        given = values.get(each.name, each.default)
        if given is each.default_factory is dataclasses.MISSING:
            raise ConfigError(f'{where}: "{prefix}{each.name}" is missing')
    return cls(**values)


def _typed(value: Any, kind: Any, name: str) -> Any:
    """Return a value as its field holds it."""
    if isinstance(kind, types.UnionType):  # ``int | None``
        if value is None:
            return None
        kind = typing.get_args(kind)[0]
    expected = KIND_NAMES.get(kind, "a list of names")
    if value is None:
        raise ConfigError(f"{name} has no value; expected {expected}")
    if typing.get_origin(kind) is tuple:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, (list, tuple)) or not names or not all(map(_is_word, names)):
            raise ConfigError(f"{name} is {brief(value)}; expected a list of names such as [a, b]")
        if len(set(names)) != len(names):
            raise ConfigError(f"{name} names the same thing twice: {brief(value)}")
        return tuple(names)
    if kind is float and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # 1 is a number, too, and 1e400 is infinity
            value = float(str(value))
    if type(value) is not kind or (kind is str and not _is_word(value)):
        raise ConfigError(f"{name} is {brief(value)}; expected {expected}")
    return value


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and is_text(value)


LIMITS = {
    "ge": (operator.ge, "the least is"),
    "gt": (operator.gt, "it must be above"),
    "le": (operator.le, "the most is"),
}


def _check_limits(value: Any, limits: Mapping[str, Any], name: str) -> None:
    if choices := limits.get("choices"):
        for each in value if isinstance(value, tuple) else (value,):
            if each not in choices:
                raise ConfigError(f'{name} cannot be "{each}"{did_you_mean(each, choices)}')
    if not isinstance(value, (int, float)):
        return
    if isinstance(value, int):
        limits = {"le": 2**31 - 1, **limits}  # what the libraries count with
    elif math.isnan(value):
        raise ConfigError(f"{name} is not a number (NaN)")
    elif math.isinf(value):
        raise ConfigError(f"{name} is {value}; it must be finite")
    for key, (holds, problem) in LIMITS.items():
        if key in limits and not holds(value, limits[key]):
            raise ConfigError(f"{name} is {brief(value)}; {problem} {limits[key]}")


def _check_together(config: Config, where: str) -> None:
    """Check what only several values together can get wrong."""
    dpo, loop, targets = config.dpo, config.loop, config.lora.targets
    if dpo.batch_size % dpo.micro_batch_size:
        raise ConfigError(
            f'{where}: "dpo.batch_size" ({dpo.batch_size}) must be a multiple of '
            f'"dpo.micro_batch_size" ({dpo.micro_batch_size})'
        )
    if dpo.max_prompt_length >= dpo.max_length:
        raise ConfigError(
            f'{where}: "dpo.max_prompt_length" ({dpo.max_prompt_length}) leaves no room for an '
            f'answer below "dpo.max_length" ({dpo.max_length})'
        )
    if dpo.loss == "exo_pair" and not dpo.label_smoothing:
        raise ConfigError(
            f'{where}: "dpo.loss" exo_pair needs a "dpo.label_smoothing" above 0, such as 0.001'
        )
    if dpo.loss == "robust" and dpo.label_smoothing == 0.5:
        raise ConfigError(
            f'{where}: "dpo.loss" robust needs a "dpo.label_smoothing" below 0.5: it divides by '
            "1 - 2 * label_smoothing"
        )
    if not loop.signals and (loop.keep == "best" or loop.early_stop):
        key, value = ("keep", "last") if loop.keep == "best" else ("early_stop", "false")
        raise ConfigError(
            f'{where}: "loop.signals" is false, and "loop.{key}" goes by them; set '
            f"loop.{key}={value}, or leave the signals on"
        )
    if loop.placebo and config.pairs.labels != "own":
        raise ConfigError(
            f'{where}: "loop.placebo" compares the model\'s own labels with others, and '
            f'"pairs.labels" is {config.pairs.labels}; leave one of them out'
        )
    if "all-linear" in targets and len(targets) > 1:
        raise ConfigError(
            f'{where}: "lora.targets" mixes all-linear with names; use one or the other'
        )


def warn_of_long_warmup(dpo: DPOConfig) -> None:
    """Say so where training, which is about to begin, never reaches its peak learning rate."""
    if dpo.warmup_steps > dpo.steps:
        warnings.warn(
            f"dpo.warmup_steps ({dpo.warmup_steps}) is more than dpo.steps ({dpo.steps}), so "
            "training never reaches dpo.learning_rate; set fewer steps of warm-up, or 0",
            stacklevel=3,
        )


def describe_options() -> list[tuple[str, Any, str]]:
    """Return (dotted key, default, help) for every option, in order: the reference for users."""
    rows, sections = [], typing.get_type_hints(Config)
    for key, default in Config().flat().items():
        section, _, name = key.rpartition(".")
        facts = sections.get(section, Config).__dataclass_fields__[name].metadata
        choices = f" [{' | '.join(facts['choices'])}]" if "choices" in facts else ""
        rows.append((key, default, facts["help"] + choices))
    return rows


def differing_keys(ours: Config, theirs: Config) -> list[str]:
    """Return lines such as ``dpo.beta: 0.1 here, 0.05 there`` for every differing key."""
    here, there = ours.flat(), theirs.flat()
    return [f"{k}: {here[k]} here, {there[k]} there" for k in sorted(here) if here[k] != there[k]]


def unknown_keys(tree: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys in nested mappings that are no options."""
    known = Config()
    return sorted(dict(_flatten(tree)).keys() - known.flat().keys() - known.to_dict().keys())
