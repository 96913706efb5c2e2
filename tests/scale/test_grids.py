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
    Point,
    cell_of,
    example_grids,
    expand,
    grid_from_dict,
    label,
    plan_of,
    planned_config,
    read_grid,
)


def points_of(grid: dict[str, object]) -> list[Point]:
    return expand(grid_from_dict({"profile": "smoke", "grid": grid}))


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
        ({"seed": [0, 1, 0]}, "the same point twice: profile smoke, seed=0; remove"),
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
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        read_grid("absent.yaml")


def test_a_grid_is_every_combination_seeds_innermost() -> None:
    points = points_of({"seed": [3, 4], "dpo.beta": [0.05, 0.1]})
    assert [dict(point.values) for point in points] == [
        {"dpo.beta": 0.05, "seed": 3},
        {"dpo.beta": 0.05, "seed": 4},
        {"dpo.beta": 0.1, "seed": 3},
        {"dpo.beta": 0.1, "seed": 4},
    ]
    cells = [label(cell_of(point.values)) for point in points]
    assert cells == ["beta=0.05", "beta=0.05", "beta=0.1", "beta=0.1"]
    assert points[1].config == load_config("smoke", {"dpo.beta": 0.05}, seed=4)
    (point,) = points_of({"dpo.beta": [0.05]})  # the seed is the profile's own
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
    small = points_of({"dpo.beta": [0.05], "seed": [0]})
    large = points_of({"dpo.beta": [0.05, 0.1], "seed": [0, 1]})
    assert small[0].name == large[0].name
    assert small[0].name.startswith("beta=0.05_seed=0-")
    assert len({point.name for point in large}) == 4
    for point in points_of({"questions.source": ["some dir/a b.jsonl", "x" * 300 + ".csv"]}):
        assert len(point.name) < 100
        assert not set(point.name) & set("/\\ :*?")


@pytest.mark.parametrize(
    ("kinds", "settings"),
    [
        ({PAIRS, BASE}, {"seed": 7, "model.quantization": "nf4", "model.dtype": "bfloat16"}),
        ({PAIRS, BASE}, {"model.name": "x/y"}),
        ({PAIRS}, {"questions.limit": 9, "questions.held_out": 0.5, "pairs.shots": 1}),
        ({BASE}, {"evaluation.limit": 5, "evaluation.benchmarks": ["probe"]}),
        ({BASE}, {"evaluation.bootstrap": 100}),
        (set(), {"dpo.beta": 0.3, "dpo.reference": "base", "lora.r": 2, "loop.iterations": 3}),
        (set(), {"evaluation.every_iteration": False}),
    ],
)
def test_a_stage_is_another_when_what_it_depends_on_is(kinds: set[str], settings) -> None:
    (plain,) = points_of({"seed": [0]})
    for key, value in settings.items():
        (other,) = points_of({key: [value]})
        assert {k for k in (PAIRS, BASE) if plain.shared(k) != other.shared(k)} == kinds


def test_every_setting_but_those_of_training_belongs_to_a_shared_stage() -> None:
    """A section that the configuration gets later must not be forgotten here."""
    sections = {f.name for f in dataclasses.fields(Config)}
    shared = {"seed", "model", "questions", "pairs", "evaluation"}
    assert sections - shared == {"profile", "lora", "dpo", "loop"}


def test_shared_stages_are_shared_across_profiles_that_agree() -> None:
    smoke = load_config("smoke").flat().items()
    base = {key: value for key, value in smoke if key.startswith(("model.", "evaluation."))}
    tree = {"profile": ["smoke", "cpu"], "set": base, "grid": {"seed": [0]}}
    one, two = expand(grid_from_dict(tree))
    assert one.shared(BASE) == two.shared(BASE)
    assert one.shared(PAIRS) != two.shared(PAIRS)


def test_arms_that_differ_in_labels_share_their_pairs() -> None:
    own, coin, turned = points_of({"pairs.labels": ["own", "random", "annotated"]})
    assert own.shared(PAIRS) == coin.shared(PAIRS) == turned.shared(PAIRS)
    (part,) = points_of({"pairs.flipped": [0.25]})
    assert part.shared(PAIRS).pairs == own.shared(PAIRS).pairs


def test_the_plan_holds_every_configuration() -> None:
    axes = {"dpo.beta": [0.05, 0.1], "seed": [0, 1]}
    grid = grid_from_dict({"profile": "smoke", "grid": axes})
    points = expand(grid)
    plan = json.loads(json.dumps(plan_of(points, grid, "somewhere")))
    assert len(plan["points"]) == 4
    assert [stage["kind"] for stage in plan["shared"].values()] == [PAIRS, BASE, PAIRS, BASE]
    for point, planned in zip(points, plan["points"], strict=True):
        assert planned_config(plan, planned["name"]) == point.config
        for kind in (PAIRS, BASE):
            assert planned_config(plan, planned[kind]) == point.shared(kind)
    with pytest.raises(ConfigError, match='no point or stage "beta"'):
        planned_config(plan, "beta")


@pytest.mark.parametrize("name", example_grids())
def test_an_example_is_one_question_over_several_seeds(name: str) -> None:
    """Its cells differ, hold the same seeds, and its points' names say what they are."""
    points = expand(read_grid(name))
    cells: dict[str, set[int]] = {}
    for point in points:
        cells.setdefault(label(cell_of(point.values)), set()).add(point.config.seed)
    seeds = set(range({"smoke_2x2x2": 2, "what_matters_seed": 8}.get(name, 3)))
    assert all(found == seeds for found in cells.values())
    assert len({point.name for point in points}) == len(points) == len(cells) * len(seeds)
    text = example_grids()[name].read_text(encoding="utf-8")
    assert text.startswith("# "), "a shipped grid says what it asks"
