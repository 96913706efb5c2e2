"""Profiles and overrides: complete, frozen, and wrong input named by its key."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from grath_utils.config import (
    BUILT_IN_MODELS,
    BUILT_IN_SOURCES,
    OWN_QUESTIONS,
    Config,
    config_from_dict,
    describe_options,
    differing_keys,
    load_config,
    parse_overrides,
    profile_names,
)
from grath_utils.errors import ConfigError
from grath_utils.pairs.questions import ARC_SUBSETS


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_loads_and_round_trips(name: str) -> None:
    config = load_config(name)
    assert config.profile == name
    assert config_from_dict(config.to_dict()) == config
    assert differing_keys(config, config) == []


def test_the_documented_profiles_are_there() -> None:
    paper = ["paper-llama2", "paper-llama2-fixref", "paper-zephyr", "paper-zephyr-fixref"]
    assert profile_names() == ["colab-t4", "cpu", "cpu-long", "cpu-tiny", *paper, "smoke"]


def test_config_is_frozen() -> None:
    config = load_config("cpu")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dpo.beta = 1.0  # type: ignore[misc]


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    plain = load_config("cpu")
    changed = load_config(
        "cpu", "dpo.beta=0.05 lora.targets=[q_proj,v_proj] questions.limit=null", seed=7
    )
    assert changed.dpo.beta == 0.05
    assert changed.lora.targets == ("q_proj", "v_proj")
    assert changed.questions.limit is None
    assert changed.seed == 7
    different = {line.split(":")[0] for line in differing_keys(changed, plain)}
    assert different == {"dpo.beta", "lora.targets", "questions.limit", "seed"}


def test_a_number_without_a_dot_is_a_number() -> None:
    # YAML 1.1 reads 5e-4 as text.
    assert load_config("cpu", "dpo.learning_rate=5e-4").dpo.learning_rate == 5e-4
    assert load_config("cpu", "dpo.beta=1").dpo.beta == 1.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("dpo.bata=0.1", 'unknown key "dpo.bata".*did you mean "dpo.beta"'),
        ("beta=0.1", 'unknown key "beta"'),
        ("dpo.beta=much", "\"dpo.beta\" is 'much'; expected a number"),
        ("dpo.beta=0", '"dpo.beta" is 0.0; it must be above 0'),
        ("dpo.beta=.nan", '"dpo.beta" is not a number'),
        ("dpo.beta=.inf", '"dpo.beta" is inf; it must be finite'),
        ("dpo.beta=null", '"dpo.beta" has no value'),
        ("dpo.steps=2.5", '"dpo.steps" is 2.5; expected a whole number'),
        ("dpo.steps=true", '"dpo.steps" is True; expected a whole number'),
        ("dpo.steps=0", '"dpo.steps" is 0; the least is 1'),
        ("dpo.reference=bass", '"dpo.reference" cannot be "bass".*did you mean "base"'),
        ("dpo.gradient_checkpointing=1", "expected true or false"),
        ("dpo.gradient_checkpointing=yes", "is 'yes'; expected true or false"),
        ("dpo.batch_size=7", "must be a multiple of"),
        ("dpo.max_prompt_length=2000", "leaves no room for an answer"),
        ("lora.targets=[]", "expected a list of names"),
        ("lora.targets=[q_proj,q_proj]", "names the same thing twice"),
        ("lora.targets=[all-linear,q_proj]", "mixes all-linear with names"),
        ("dpo.beta", "expected key=value"),
        ("dpo.beta=0.1 dpo.beta=0.2", "given twice"),
        ("dpo.beta='0.1", "cannot read the overrides"),
        ("profile=smoke", "choose the profile itself"),
        ("seed=-1", '"seed" is -1; the least is 0'),
        ("questions.held_out=0.9", "the most is 0.5"),
        ("loop.signals=false", '"loop.keep" goes by them; set loop.keep=last'),
        ("loop.signals=false loop.keep=last", '"loop.early_stop" goes by them'),
    ],
)
def test_wrong_overrides_are_named(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("cpu", overrides)


def test_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match='unknown profile "cpuu"; did you mean "cpu"'):
        load_config("cpuu")


def test_a_profile_file_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("dpo:\n  beta: 0.3\nloop:\n", encoding="utf-8")
    config = load_config(str(path))
    assert config.dpo.beta == 0.3
    assert load_config(config.profile) == config  # its recorded name finds it again
    path.write_text("dpo:\n  beta: [", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine.yaml, line \d+: not valid YAML"):
        load_config(str(path))
    path.write_text("just words", encoding="utf-8")
    with pytest.raises(ConfigError, match="expected `key: value` lines"):
        load_config(str(path))
    with pytest.raises(ConfigError, match="no such file"):
        load_config(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-0", 0), ("5e-4", 5e-4), (".5", 0.5), ("2.", 2.0), ("1e3", 1000.0),
        ("true", True), ("False", False), ("TRUE", True), ("tRUE", "tRUE"), ("trueish", "trueish"),
        ("yes", "yes"), ("No", "No"), ("on", "on"), ("off", "off"), ("y", "y"),
        ("~", None), ("", None), ("[a, 1]", ["a", 1]),
        ("1:30", "1:30"), ("2020-01-01", "2020-01-01"), ("2020-99-01", "2020-99-01"),
        ("0x1f", "0x1f"), ("1_000", "1_000"), ("雪", "雪"), ("a=b", "a=b"),
    ],
)  # fmt: skip
def test_yaml_is_read_as_people_read_it(text: str, value: object) -> None:
    read = parse_overrides([f"key={text}"])["key"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dpo: 3", '"dpo" holds 3; expected keys below it'),
        ("dpo: &a [*a]", '"dpo" holds .*; expected keys below it'),
        ("&a {dpo: *a}", 'unknown key "dpo.dpo"'),
        ("lora: {targets: [" + ", ".join(  # two to the power of 99 words
            f"&a{i} [{f'*a{i - 1}, *a{i - 1}' if i else 'x'}]" for i in range(100)
        ) + "]}", '"lora.targets" is .*; expected a list of names'),
        ("? [a]\n: 1", "line 1: a key must be one word"),
        ("seed: 0\nseed: 0", 'line 2: "seed" is given twice'),
        ("seed: 0\n--- \nseed: 1", "mine.yaml, line 2: not valid YAML"),
        ("dpo: !!python/object:os.system {}", "line 1: could not determine a constructor"),
        ("seed: !!bool 3", "mine.yaml: not valid YAML"),
        ("seed: " + "9" * 5000, r"not valid YAML \(Exceeds the limit"),
        ("seed: " + "[" * 5000, "not valid YAML .maximum recursion"),
        ("seed: " + "9" * 4000, '"seed" is 9*[.]+9*; the most is 2147483647'),
        ("dpo: {batch_size: 2147483648}", '"dpo.batch_size" is 2147483648; the most is 21474'),
        ("dpo: {beta: " + "9" * 400 + "}", '"dpo.beta" is inf; it must be finite'),
        ("dpo: {batch_size: 1e3}", '"dpo.batch_size" is 1000.0; expected a whole number'),
        ('model: {name: "\\ud800"}', '"model.name" is .*; expected text'),
        ('model: {name: "a\\0b"}', '"model.name" is .*; expected text'),
        ('model: {name: " "}', '"model.name" is .*; expected text'),
        ('lora: {targets: ["a\\0b"]}', '"lora.targets" is .*; expected a list'),
    ],
)  # fmt: skip
def test_a_wrong_profile_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    for overrides in ("", "dpo.steps=3 lora.r=2"):
        with pytest.raises(ConfigError, match=message) as caught:
            load_config(str(path), overrides)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("wrong", [3, None, ["cpu"], b"cpu"])
def test_a_profile_or_overrides_of_another_type(wrong: object) -> None:
    with pytest.raises(ConfigError, match="expected a name such as cpu"):
        load_config(wrong)
    with pytest.raises(ConfigError, match="overrides"):
        load_config("cpu", wrong)


def test_a_built_in_name_means_the_same_in_every_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in BUILT_IN_SOURCES:
        Path(name).touch()
        for given, found in ((name, name), (f"./{name}", str(tmp_path / name))):
            assert load_config("cpu", {"questions.source": given}).questions.source == found
    for name in BUILT_IN_MODELS:
        Path(name).mkdir()
        for given, found in ((name, name), (f"./{name}", str(tmp_path / name))):
            assert load_config("cpu", {"model.name": given}).model.name == found
    assert {*OWN_QUESTIONS, *ARC_SUBSETS} == set(BUILT_IN_SOURCES)


def test_overrides_as_mapping_list_and_text_agree() -> None:
    expected = {"dpo.beta": 0.05, "questions.source": "my file.jsonl"}
    assert parse_overrides('dpo.beta=0.05 questions.source="my file.jsonl"') == expected
    assert parse_overrides(["dpo.beta=0.05", "questions.source=my file.jsonl"]) == expected
    assert parse_overrides(expected) == expected


def test_every_option_is_documented() -> None:
    rows = describe_options()
    assert {key for key, _, _ in rows} == set(Config().flat())
    assert all(len(text) > 8 for _, _, text in rows)


def test_paper_presets_hold_the_official_numbers() -> None:
    """RECIPE of the official code: beta, rate, warm-up, batch, steps, LoRA, lengths."""
    llama, zephyr = load_config("paper-llama2"), load_config("paper-zephyr")
    assert (llama.dpo.beta, llama.dpo.learning_rate, llama.dpo.warmup_steps) == (0.1, 5e-4, 100)
    assert (llama.dpo.batch_size, llama.dpo.micro_batch_size) == (16, 4)
    assert (llama.dpo.steps, zephyr.dpo.steps) == (1000, 500)
    assert (llama.dpo.max_prompt_length, llama.dpo.max_length) == (512, 1024)
    assert (llama.lora.r, llama.lora.alpha) == (8, 16)
    assert llama.lora.targets == ("q_proj", "k_proj", "v_proj")
    assert (llama.dpo.reference, llama.loop.iterations) == ("current", 2)
    assert (llama.dpo.max_grad_norm, llama.dpo.weight_decay) == (1.0, 0.0)
    assert (llama.pairs.mode, llama.pairs.retry_failed) == ("paper", False)
    different = {line.split(":")[0] for line in differing_keys(llama, zephyr)}
    assert different == {"profile", "model.name", "dpo.steps"}


@pytest.mark.parametrize("model", ["llama2", "zephyr"])
def test_fix_ref_differs_from_the_headline_in_the_documented_values_only(model: str) -> None:
    headline, fixed = load_config(f"paper-{model}"), load_config(f"paper-{model}-fixref")
    different = {line.split(":")[0] for line in differing_keys(headline, fixed)}
    assert different - {"dpo.steps"} == {"profile", "dpo.reference", "loop.iterations"}
    assert (fixed.dpo.reference, fixed.loop.iterations, fixed.dpo.steps) == ("base", 10, 1000)
