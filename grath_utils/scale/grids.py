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

import dataclasses
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grath_utils.config import Config, config_from_dict, load_config
from grath_utils.errors import ConfigError, did_you_mean
from grath_utils.files import fingerprint

PAIRS, BASE = "pairs", "base"
SHARED_SECTIONS: dict[str, tuple[str, ...]] = {
    PAIRS: ("seed", "model", "questions", "pairs"),
    BASE: ("seed", "model", "evaluation"),
}
"""What a shared stage depends on: the pairs of iteration 0, and the evaluation of the base model.

The training settings are in neither: both happen before the first step.
"""
LONGEST_NAME = 72


@dataclass(frozen=True)
class Grid:
    """A grid as it stands in its file."""

    where: str
    """What to call it in messages."""
    profiles: tuple[str, ...]
    common: Mapping[str, Any]
    axes: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Shared:
    """A stage that several points need: what it is, and the configuration of its run directory."""

    kind: str
    config: Config

    @property
    def name(self) -> str:
        """Its address, such as ``pairs-0f3c…``: the same for the same work."""
        return f"{self.kind}-{fingerprint(self.config.to_dict())}"


@dataclass(frozen=True)
class Point:
    """One point of the grid: a whole run."""

    values: Mapping[str, Any]
    """Its value of every key that the grid varies, ``seed`` always among them."""
    config: Config

    @property
    def name(self) -> str:
        """The name of its run directory: readable, and different for every configuration."""
        readable = "_".join(f"{leaf}={_shown(value)}" for leaf, value in self._short().items())
        slug = re.sub(r"[^\w.=+-]+", "-", readable)[:LONGEST_NAME].rstrip("-._=")
        return f"{slug}-{fingerprint(self.config.to_dict())[:8]}"

    def _short(self) -> dict[str, Any]:
        names = short_names(self.values)
        return {names[key]: value for key, value in self.values.items()}

    @property
    def cell(self) -> dict[str, Any]:
        """Its values without the seed."""
        return {key: value for key, value in self.values.items() if key != "seed"}

    def shared(self, kind: str) -> Shared:
        """Return the shared stage of a kind that this point uses."""
        return Shared(kind, only_sections(self.config, SHARED_SECTIONS[kind]))


def only_sections(config: Config, sections: tuple[str, ...]) -> Config:
    """Return ``config`` with every other section put to its default.

    Which iterations are evaluated is no matter of the base model, so that is put to its default
    as well.
    """
    kept = {name: getattr(config, name) for name in sections}
    if "evaluation" in kept:
        plain = Config().evaluation.every_iteration
        kept["evaluation"] = dataclasses.replace(kept["evaluation"], every_iteration=plain)
    return dataclasses.replace(Config(), **kept)


def short_names(keys: Mapping[str, Any] | tuple[str, ...]) -> dict[str, str]:
    """Return what to call each dotted key: its last part where that is clear, else all of it."""
    leaves = [key.rpartition(".")[2] for key in keys]
    return {
        key: leaf if leaves.count(leaf) == 1 else key
        for key, leaf in zip(keys, leaves, strict=True)
    }


def label(values: Mapping[str, Any], *, between: str = ", ") -> str:
    """Return ``beta=0.05, chain=fresh`` for a cell, ``all settings`` for one without a key."""
    names = short_names(values)
    shown = between.join(f"{names[key]}={_shown(value)}" for key, value in values.items())
    return shown or "all settings"


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value))
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, str) and "/" in value:
        return Path(value).name  # the end of a path or of a Hub id says enough
    return str(value)


# --- reading -------------------------------------------------------------------------------------


def grid_names() -> list[str]:
    """Return the names of the example grids that come with the package."""
    return sorted(path.stem for path in sweep_dir().glob("*.yaml"))


def sweep_dir() -> Path:
    """Return the folder with the example grids and the Snakefile."""
    return Path(__file__).resolve().parent / "grid_files"


def read_grid(name: str) -> Grid:
    """Read a grid by the name of an example, or by the path of a YAML file.

    Raises:
        ConfigError: no such grid, not a grid, an unknown key, or a key without a list of values;
            the message names the key and the nearest valid one.
    """
    is_file = name.endswith((".yaml", ".yml"))
    if not is_file and name not in grid_names():
        raise ConfigError(
            f'unknown grid "{name}"{did_you_mean(name, grid_names())}; or name a .yaml file'
        )
    path = Path(name).expanduser() if is_file else sweep_dir() / f"{name}.yaml"
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Strict)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text; save the file as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = error.problem if isinstance(error, _DoubledKey) else "not valid YAML"
        raise ConfigError(f"{path}{line}: {reason}") from error
    return grid_from_dict(tree, where=str(path))


class _DoubledKey(yaml.constructor.ConstructorError):
    pass


class _Strict(yaml.SafeLoader):
    """YAML lets a later key replace an earlier one; in a grid that would drop points silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                problem = f'"{key}" is given twice'
                raise _DoubledKey(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def grid_from_dict(tree: Any, *, where: str = "grid") -> Grid:
    """Check the form of a grid and every key in it; the values are checked in :func:`expand`.

    Raises:
        ConfigError: names ``where``, the key and the nearest valid one.
    """
    top = ("profile", "set", "grid")
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}: expected `profile:` and `grid:`, found {tree!r}")
    for key in tree:
        if key not in top:
            raise ConfigError(f'{where}: unknown key "{key}"{did_you_mean(str(key), top)}')
    profiles = tree.get("profile")
    profiles = (profiles,) if isinstance(profiles, str) else profiles
    if not _is_list(profiles) or not all(isinstance(name, str) and name for name in profiles):
        raise ConfigError(
            f'{where}: "profile" is {tree.get("profile")!r}; expected the name of a profile, or a '
            "list of names"
        )
    common = tree.get("set") or {}
    axes = tree.get("grid")
    if not isinstance(axes, Mapping) or not axes:
        raise ConfigError(f'{where}: "grid" is {axes!r}; expected lines such as `seed: [0, 1]`')
    if not isinstance(common, Mapping):
        raise ConfigError(f'{where}: "set" is {common!r}; expected lines such as `dpo.beta: 0.1`')
    known = set(Config().flat()) - {"profile"}
    for section, keys in (("set", common), ("grid", axes)):
        for key in keys:
            if key == "profile":
                raise ConfigError(f'{where}: "profile" stands beside "grid", not in "{section}"')
            if key not in known:
                near = did_you_mean(str(key), known)
                raise ConfigError(f'{where}: unknown key "{key}" in "{section}"{near}')
    for key, values in axes.items():
        if key in common:
            raise ConfigError(f'{where}: "{key}" stands in "set" and in "grid"; remove one')
        if not _is_list(values):
            raise ConfigError(
                f'{where}: "{key}" is {values!r}; expected a list of values, such as '
                f"`{key}: [{values if values not in (None, []) else '...'}]`"
            )
    return Grid(where, tuple(profiles), dict(common), {k: tuple(v) for k, v in axes.items()})


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0


# --- points --------------------------------------------------------------------------------------


def expand(grid: Grid) -> list[Point]:
    """Return the points of a grid, the last key varying fastest, seeds innermost.

    Raises:
        ConfigError: a point that cannot be (the key, its value and what is valid are named), or
            two points that are the same.
    """
    axes = {key: values for key, values in grid.axes.items() if key != "seed"}
    if "seed" in grid.axes:
        axes["seed"] = grid.axes["seed"]
    points: list[Point] = []
    seen: dict[str, str] = {}
    for profile in grid.profiles:
        for combination in itertools.product(*axes.values()):
            chosen = dict(zip(axes, combination, strict=True))
            try:
                config = load_config(profile, {**grid.common, **chosen})
            except ConfigError as error:
                raise ConfigError(
                    f"{grid.where}, point {_named(profile, chosen)}: {error}"
                ) from error
            point = Point(_values(grid, config, axes), config)
            address = fingerprint(config.to_dict())
            if address in seen:
                raise ConfigError(
                    f"{grid.where}: the same point twice: {_named(profile, chosen)} and "
                    f"{seen[address]}; remove the doubled value"
                )
            seen[address] = _named(profile, chosen)
            points.append(point)
    return points


def _values(grid: Grid, config: Config, axes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a point's values as they were understood (5e-4 is a number, whatever YAML says)."""
    flat = config.flat()
    keys = [key for key in axes if key != "seed"]
    profile = {"profile": config.profile} if len(grid.profiles) > 1 else {}
    return {**profile, **{key: flat[key] for key in keys}, "seed": config.seed}


def _named(profile: str, chosen: Mapping[str, Any]) -> str:
    return ", ".join([f"profile {profile}", *(f"{k}={v!r}" for k, v in chosen.items())])


# --- the plan, as it stands in points.json -------------------------------------------------------


def plan_of(points: list[Point], grid: Grid, made_in: str) -> dict[str, Any]:
    """Return what the jobs of a sweep need to know, as plain JSON.

    Args:
        made_in: the working directory that relative paths in the grid start from.
    """
    stages = {
        stage.name: stage for p in points for stage in map(p.shared, SHARED_SECTIONS)
    }  # the order of first use
    return {
        "schema_version": 1,
        "grid": grid.where,
        "made_in": made_in,
        "keys": list(points[0].values),
        "shared": {
            name: {"kind": stage.kind, "config": stage.config.to_dict()}
            for name, stage in stages.items()
        },
        "points": [
            {
                "name": point.name,
                "values": dict(point.values),
                "config": point.config.to_dict(),
                **{kind: point.shared(kind).name for kind in SHARED_SECTIONS},
            }
            for point in points
        ],
    }


def planned_config(plan: Mapping[str, Any], name: str) -> Config:
    """Return the configuration of a point or a shared stage of ``points.json``.

    Raises:
        ConfigError: it has neither.
    """
    known = {point["name"]: point for point in plan["points"]} | plan["shared"]
    if name not in known:
        raise ConfigError(f'the sweep has no point or stage "{name}"{did_you_mean(name, known)}')
    return config_from_dict(known[name]["config"], where=name)
