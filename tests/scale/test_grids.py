"""Grids: what is refused before anything runs, the points, and what they share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from grath_utils.config import Config, load_config
from grath_utils.errors import ConfigError
from grath_utils.scale.grids import (
    BASE,
    PAIRS,
    cell_of,
    expand,
    grid_from_dict,
    grid_names,
    label,
    plan_of,
    planned_config,
    read_grid,
    sweep_dir,
)


def points_of(**grid: object):
    return expand(grid_from_dict({"profile": "smoke", "grid": grid}))


def keyed(**dotted: object) -> dict[str, object]:
    return {key.replace("__", "."): value for key, value in dotted.items()}


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected `profile:` and `grid:`"),
        ("profile: smoke", '"grid" is None'),
        ("profile: smoke\ngrid: {}", '"grid" is {}'),
        ("profile: smoke\ngrid: [1]", '"grid" is [1]'),
        ("grid: {seed: [0]}", '"profile" is None'),
        ("profile: []\ngrid: {seed: [0]}", '"profile" is []'),
        ("profile: 3\ngrid: {seed: [0]}", '"profile" is 3'),
        ("profile: smoke\ngird: {seed: [0]}", 'unknown key "gird"; did you mean "grid"?'),
        (
            "profile: smoke\ngrid: {dpo.bata: [0.1]}",
            'unknown key "dpo.bata" in "grid"; did you mean "dpo.beta"?',
        ),
        (
            "profile: smoke\ngrid: {seed: [0]}\nset: {dop.beta: 1}",
            'unknown key "dop.beta" in "set"; did you mean "dpo.beta"?',
        ),
        ("profile: smoke\ngrid: {dpo: [0.1]}", 'unknown key "dpo" in "grid"'),
        ("profile: smoke\ngrid: {profile: [cpu]}", '"profile" stands beside "grid"'),
        ("profile: smoke\ngrid: {dpo.beta: 0.1}", "`dpo.beta: [0.1]`"),
        ("profile: smoke\ngrid: {dpo.beta: []}", '"dpo.beta" is []; expected a list'),
        (
            "profile: smoke\nset: {dpo.beta: 1}\ngrid: {dpo.beta: [1]}",
            '"dpo.beta" stands in "set" and in "grid"',
        ),
        ("profile: smoke\ngrid:\n  seed: [0]\n  seed: [1]", 'line 4: "seed" is given twice'),
        ("profile: smoke\ngrid: {seed: [0", "line 2: not valid YAML"),
    ],
)
def test_a_malformed_grid_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        expand(read_grid(str(path)))
    assert message in str(error.value)
    assert "mine.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"dpo.beta": [0.1, -1]}, '"dpo.beta" is -1.0; it must be above 0'),
        ({"seed": [0, "x"]}, "\"seed\" is 'x'; expected a whole number"),
        ({"dpo.chain": ["mrege"]}, 'cannot be "mrege"; did you mean "merge"?'),
        ({"dpo.batch_size": [6]}, "must be a multiple of"),
        ({"dpo.beta": [0.1, "1e-1"]}, "the same point twice"),
        ({"seed": [0, 1, 0]}, "the same point twice: profile smoke, seed=0 and"),
    ],
)
def test_an_impossible_or_doubled_point_is_refused(grid, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        expand(grid_from_dict({"profile": "smoke", "grid": grid}, where="my grid"))
    assert message in str(error.value)
    assert str(error.value).startswith("my grid")


def test_unknown_profiles_and_grids_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match='unknown profile "smok"; did you mean "smoke"'):
        expand(grid_from_dict({"profile": "smok", "grid": {"seed": [0]}}))
    with pytest.raises(ConfigError, match='did you mean "smoke_2x2x2"'):
        read_grid("smoke_2x2")
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        read_grid("absent.yaml")


# --- points --------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_seeds_innermost() -> None:
    points = points_of(**keyed(seed=[3, 4], dpo__beta=[0.05, 0.1]))
    assert [dict(point.values) for point in points] == [
        {"dpo.beta": 0.05, "seed": 3},
        {"dpo.beta": 0.05, "seed": 4},
        {"dpo.beta": 0.1, "seed": 3},
        {"dpo.beta": 0.1, "seed": 4},
    ]
    assert [label(cell_of(point.values)) for point in points] == ["beta=0.05"] * 2 + [
        "beta=0.1"
    ] * 2
    assert points[1].config == load_config("smoke", {"dpo.beta": 0.05}, seed=4)


def test_without_seeds_the_profile_s_own_is_the_seed() -> None:
    (point,) = points_of(**keyed(dpo__beta=[0.05]))
    assert point.values == {"dpo.beta": 0.05, "seed": 0}


def test_common_settings_and_several_profiles() -> None:
    tree = {
        "profile": ["smoke", "cpu"],
        "set": {"questions.limit": 20},
        "grid": {"lora.targets": [["q_proj"], ["q_proj", "v_proj"]]},
    }
    points = expand(grid_from_dict(tree))
    assert [point.values["profile"] for point in points] == ["smoke", "smoke", "cpu", "cpu"]
    assert {point.config.questions.limit for point in points} == {20}
    assert points[1].config.lora.targets == ("q_proj", "v_proj")
    assert label(cell_of(points[1].values)) == "profile=smoke, targets=q_proj+v_proj"


def test_names_are_plain_distinct_and_stay_when_the_grid_grows() -> None:
    small = points_of(**keyed(dpo__beta=[0.05], seed=[0]))
    large = points_of(**keyed(dpo__beta=[0.05, 0.1], seed=[0, 1]))
    assert small[0].name == large[0].name
    assert small[0].name.startswith("beta=0.05_seed=0-")
    assert len({point.name for point in large}) == 4
    odd = points_of(**keyed(questions__source=["some dir/a b.jsonl", "x" * 300 + ".csv"]))
    for point in odd:
        assert len(point.name) < 100
        assert not set(point.name) & set("/\\ :*?")


# --- what is shared ------------------------------------------------------------------------------

FOR_BOTH = {"seed": 7, "model.quantization": "nf4", "model.dtype": "bfloat16", "model.name": "x/y"}
FOR_PAIRS = {"questions.limit": 9, "questions.held_out": 0.5, "pairs.shots": 1}
FOR_BASE = {"evaluation.limit": 5, "evaluation.benchmarks": ["probe"], "evaluation.bootstrap": 100}
FOR_NEITHER = {
    "dpo.beta": 0.3,
    "dpo.reference": "base",
    "lora.r": 2,
    "loop.iterations": 3,
    "evaluation.every_iteration": False,
}


@pytest.mark.parametrize(("key", "value"), [*FOR_BOTH.items(), *FOR_PAIRS.items()])
def test_the_pairs_are_others_when_what_they_depend_on_is(key: str, value: object) -> None:
    plain, other = points_of(seed=[0])[0], points_of(**{key: [value]})[0]
    assert plain.shared(PAIRS).name != other.shared(PAIRS).name
    assert (plain.shared(BASE).name == other.shared(BASE).name) == (key in FOR_PAIRS)


@pytest.mark.parametrize(("key", "value"), [*FOR_BASE.items(), *FOR_NEITHER.items()])
def test_the_pairs_are_the_same_when_only_other_things_differ(key: str, value: object) -> None:
    plain, other = points_of(seed=[0])[0], points_of(**{key: [value]})[0]
    assert plain.shared(PAIRS) == other.shared(PAIRS)
    assert (plain.shared(BASE) == other.shared(BASE)) == (key in FOR_NEITHER)


def test_every_setting_but_those_of_training_belongs_to_a_shared_stage() -> None:
    """A section that the configuration gets later must not be forgotten here."""
    sections = {f.name for f in dataclasses.fields(Config)}
    shared = {"seed", "model", "questions", "pairs", "evaluation"}
    assert sections - shared == {"profile", "lora", "dpo", "loop"}


def test_shared_stages_are_shared_across_profiles_that_agree() -> None:
    tree = {"profile": ["smoke", "cpu"], "grid": {"seed": [0]}}
    tree["set"] = {
        key: value
        for key, value in load_config("smoke").flat().items()
        if key.split(".")[0] in ("model", "evaluation")
    }
    one, two = expand(grid_from_dict(tree))
    assert one.shared(BASE).name == two.shared(BASE).name
    assert one.shared(PAIRS).name != two.shared(PAIRS).name


def test_the_plan_holds_every_configuration() -> None:
    grid = grid_from_dict({"profile": "smoke", "grid": keyed(dpo__beta=[0.05, 0.1], seed=[0, 1])})
    points = expand(grid)
    plan = json.loads(json.dumps(plan_of(points, grid, "somewhere")))
    assert len(plan["points"]) == 4
    assert [stage["kind"] for stage in plan["shared"].values()] == [PAIRS, BASE, PAIRS, BASE]
    for point, planned in zip(points, plan["points"], strict=True):
        assert planned_config(plan, planned["name"]) == point.config
        for kind in (PAIRS, BASE):
            assert planned_config(plan, planned[kind]) == point.shared(kind).config
    with pytest.raises(ConfigError, match='no point or stage "beta"'):
        planned_config(plan, "beta")


SHIPPED = {
    "smoke_2x2x2": 8,
    "what_matters_answers": 6,
    "what_matters_chain": 9,
    "what_matters_distance": 6,
    "what_matters_domain": 6,
    "what_matters_gold": 12,
    "what_matters_iterations": 24,
    "what_matters_pairs": 12,
    "what_matters_reference": 18,
    "what_matters_seed": 8,
    "what_matters_shots": 9,
}


def test_the_example_grids_are_whole() -> None:
    assert {name: len(expand(read_grid(name))) for name in grid_names()} == SHIPPED


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("what_matters")])
def test_an_experiment_is_one_question_over_several_seeds(name: str) -> None:
    """Its cells differ, hold the same seeds, and its points' names say what they are."""
    points = expand(read_grid(name))
    cells: dict[str, set[int]] = {}
    for point in points:
        cells.setdefault(label(cell_of(point.values)), set()).add(point.config.seed)
    seeds = set(range(8 if name == "what_matters_seed" else 3))
    assert len(cells) * len(seeds) == len(points)
    assert all(found == seeds for found in cells.values())
    assert len({point.name for point in points}) == len(points)
    text = (sweep_dir() / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# "), "a shipped grid says what it asks"
