"""A grid of runs: read, checked whole, expanded to points, and what the points can share.

A grid is a YAML file::

    profile: cpu                 # a profile, or a list of them
    set: {questions.limit: 120}  # what all points have in common (optional)
    grid:                        # a list of values for each key; a point is one of each
      seed: [0, 1, 2]
      dpo.beta: [0.05, 0.1]

Points that differ in their seed alone form a *cell*; intervals are over its seeds. What two points
may share is decided by content: a stage has the address of the configuration of all that it
depends on, everything else put to its default, and points with the same address use the same
stage.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grath_utils.config import Config, config_from_dict, load_config, own_settings
from grath_utils.errors import ConfigError, did_you_mean
from grath_utils.files import fingerprint, read_yaml
from grath_utils.loop.plan import check_settings

GRID_FILES = Path(__file__).resolve().parent / "grid_files"  # the examples and the Snakefile
PAIRS, BASE = "pairs", "base"
SHARED_SECTIONS = {
    PAIRS: ("seed", "model", "questions", "pairs"),
    BASE: ("seed", "model", "evaluation"),
}
"""What a stage that comes before any training depends on: the pairs of iteration 0, the base's
evaluation."""


@dataclass(frozen=True)
class Grid:
    """A grid as it stands in its file; ``where`` is what to call it in messages."""

    where: str
    profiles: tuple[str, ...]
    common: Mapping[str, Any]
    axes: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Point:
    """One point of the grid: a whole run."""

    values: Mapping[str, Any]  # of every key that the grid varies, and the seed
    config: Config

    @property
    def name(self) -> str:
        """The name of its run directory: readable, and different for every configuration."""
        slug = re.sub(r"[^\w.=+-]+", "-", label(self.values, between="_"))
        return f"{slug[:72].rstrip('-._=')}-{fingerprint(own_settings(self.config))[:8]}"

    def shared(self, kind: str) -> Config:
        """Return the configuration of the shared stage of a kind that this point uses."""
        kept = {name: getattr(self.config, name) for name in SHARED_SECTIONS[kind]}
        if kind == PAIRS:  # the same pairs, whatever labels they are then given
            kept["pairs"] = replace(kept["pairs"], labels="own", flipped=0.0)
        if kind == BASE:  # which iterations are evaluated does not matter to the base model
            every = Config().evaluation.every_iteration
            kept["evaluation"] = replace(kept["evaluation"], every_iteration=every)
        return Config(**kept)


def cell_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a point's values without its seed: points with the same ones are one cell."""
    return {key: value for key, value in values.items() if key != "seed"}


def label(values: Mapping[str, Any], *, between: str = ", ") -> str:
    """Return ``beta=0.05, chain=fresh``: of each key the last part, where that is clear."""
    leaves = [key.rpartition(".")[2] for key in values]
    shown = (
        f"{leaf if leaves.count(leaf) == 1 else key}={_shown_value(value)}"
        for leaf, (key, value) in zip(leaves, values.items(), strict=True)
    )
    return between.join(shown) or "all settings"


def _shown_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return Path(value).name if "/" in str(value) else str(value)  # of a path or a Hub id, its end


def example_grids() -> dict[str, Path]:
    """Return the example grids that come with the package, by name."""
    return {path.stem: path for path in sorted(GRID_FILES.glob("*.yaml"))}


def read_grid(name: str) -> Grid:
    """Read a grid by the name of an example, or by the path of a YAML file."""
    path, examples = Path(os.path.expanduser(name)), example_grids()
    if not name.endswith((".yaml", ".yml")):
        if name not in examples:
            near = did_you_mean(name, examples)
            raise ConfigError(f'unknown grid "{name}"{near}; or name a .yaml file')
        path = examples[name]
    return grid_from_dict(read_yaml(path), where=str(path))


def grid_from_dict(tree: Any, *, where: str = "grid") -> Grid:
    """Check the form of a grid and every key in it; the values are checked in :func:`expand`."""

    def hold(good: Any, problem: str) -> None:
        if not good:
            raise ConfigError(f"{where}: {problem}")

    def hold_keys(keys: Mapping[str, Any], valid: Collection[str], inside: str = "") -> None:
        for key in keys:
            hold(key in valid, f'unknown key "{key}"{inside}{did_you_mean(str(key), valid)}')

    hold(isinstance(tree, Mapping), f"expected `profile:` and `grid:`, found {tree!r}")
    hold_keys(tree, ("profile", "set", "grid"))
    profile, common, axes = tree.get("profile"), tree.get("set") or {}, tree.get("grid")
    names = [profile] if isinstance(profile, str) else profile
    named = _is_list(names) and all(name and isinstance(name, str) for name in names)
    hold(named, f'"profile" is {profile!r}; expected the name of a profile, or a list of names')
    some = isinstance(axes, Mapping) and axes
    hold(some, f'"grid" is {axes!r}; expected lines such as `seed: [0, 1]`')
    hold(isinstance(common, Mapping), f'"set" is {common!r}; expected lines such as `seed: 0`')
    known = Config().flat().keys() - {"profile"}
    for section, keys in (("set", common), ("grid", axes)):
        hold("profile" not in keys, f'"profile" stands beside "grid", not in "{section}"')
        hold_keys(keys, known, f' in "{section}"')
    for key, values in axes.items():
        hold(key not in common, f'"{key}" stands in "set" and in "grid"; remove one')
        such = "..." if values in (None, []) else values
        expected = f"expected a list of values, such as `{key}: [{such}]`"
        hold(_is_list(values), f'"{key}" is {values!r}; {expected}')
    return Grid(where, tuple(names), dict(common), {k: tuple(v) for k, v in axes.items()})


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0


def expand(grid: Grid) -> list[Point]:
    """Return the points of a grid, the last key varying fastest, seeds innermost.

    A point's values are as they were understood (5e-4 is a number, whatever YAML says). Two points
    that are the same, and one that cannot be, are a ConfigError.
    """
    axes = dict(sorted(grid.axes.items(), key=lambda axis: axis[0] == "seed"))
    keys = dict.fromkeys(["profile"] * (len(grid.profiles) > 1) + [*axes, "seed"])
    points: dict[Config, Point] = {}
    for profile, *chosen in itertools.product(grid.profiles, *axes.values()):
        overrides = dict(zip(axes, chosen, strict=True))
        what = ", ".join([f"profile {profile}", *(f"{k}={v!r}" for k, v in overrides.items())])
        try:
            config = load_config(profile, {**grid.common, **overrides})
            check_settings(config)
        except ConfigError as error:
            raise ConfigError(f"{grid.where}, point {what}: {error}") from error
        if config in points:
            raise ConfigError(
                f"{grid.where}: the same point twice: {what}; remove the doubled value"
            )
        flat = config.flat()
        points[config] = Point({key: flat[key] for key in keys}, config)
    return [*points.values()]


def plan_of(points: list[Point], grid: Grid, made_in: str) -> dict[str, Any]:
    """Return what the jobs of a sweep need to know, as plain JSON.

    Relative paths in the grid start from the working directory ``made_in``. The name of a shared
    stage, such as ``pairs-0f3c…``, is the same for the same work.
    """
    plan = {"schema_version": 1, "grid": grid.where, "made_in": made_in, "shared": {}, "points": []}
    for point in points:
        config = point.config.to_dict()
        row = {"name": point.name, "values": dict(point.values), "config": config}
        for kind in SHARED_SECTIONS:
            stage = point.shared(kind)
            row[kind] = f"{kind}-{fingerprint(own_settings(stage))}"
            plan["shared"][row[kind]] = {"kind": kind, "config": stage.to_dict()}
        plan["points"].append(row)
    return plan


def describe_plan(plan: Mapping[str, Any]) -> str:
    """Return what the sweep will do, in a few lines."""
    values = [point["values"] for point in plan["points"]]
    cells = {fingerprint(cell_of(each)) for each in values}
    seeds = {each["seed"] for each in values}
    kinds = [stage["kind"] for stage in plan["shared"].values()]
    return (
        f"{len(values)} points: {len(cells)} cells, {len(seeds)} seeds\n"
        f"Shared: {kinds.count(PAIRS)} times the pairs of round 1, "
        f"{kinds.count(BASE)} times the evaluation of the base model"
    )


def planned_config(plan: Mapping[str, Any], name: str) -> Config:
    """Return the configuration of a point or a shared stage of ``points.json``, or refuse it."""
    known = {point["name"]: point for point in plan["points"]} | plan["shared"]
    if name not in known:
        raise ConfigError(f'the sweep has no point or stage "{name}"{did_you_mean(name, known)}')
    return config_from_dict(known[name]["config"], where=name)
