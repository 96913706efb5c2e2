"""Commands about what there is to choose from: options, ls, init, schema."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import types
import typing
from collections.abc import Callable
from typing import Any

from grath_utils import engine
from grath_utils.cli import arguments as arg
from grath_utils.config import (
    OWN_QUESTIONS,
    PROFILES,
    Config,
    describe_options,
    load_config,
    profile_names,
)
from grath_utils.errors import UsageError, did_you_mean
from grath_utils.evaluation.benchmarks import BENCHMARKS
from grath_utils.files import read_text, user_path, write_json, write_text
from grath_utils.pairs.judge import JUDGES
from grath_utils.pairs.modes import MODES
from grath_utils.pairs.parsing import FILTERS

SCHEMA = "grath.schema.json"


KINDS: dict[str, Callable[[], dict[str, str]]] = {
    "benchmarks": lambda: {name: row.about for name, row in BENCHMARKS.items()},
    "profiles": lambda: {name: _first_comment(name) for name in profile_names()},
    "questions": lambda: {
        "own": "this project's own questions, with nobody's answers "
        f"({', '.join(filter(None, OWN_QUESTIONS.values()))})",
        "own_science": "those of them about school science",
        "own_everyday": "those of them about popular beliefs, mostly false ones",
        "arc_challenge": "ARC-Challenge, training split, as in the paper (mirror or Hub)",
        "arc_easy": "ARC-Easy, training split (mirror or Hub)",
        "FILE": "your own: a .jsonl, .csv or .tsv file with a column `question`",
        "ORG/NAME": "a data set of the Hub; --column and --split say which part",
    },
    "modes": lambda: {name: mode.summary for name, mode in MODES.items()},
    "judges": lambda: {
        "none": "every pair stays as it was written, as published",
        **{name: judge.summary for name, judge in JUDGES.items()},
    },
    "models": lambda: {
        **{
            name: f"{model.title}, {model.parameters / 1e6:,.0f} million parameters, "
            f"{model.licence}; "
            + ("in the cache" if model.is_cached() else f"to fetch: {model.size / 1e6:,.0f} MB")
            for name, model in engine.COURSE_MODELS.items()
        },
        "FOLDER": "a model of your own in the form of transformers",
        "ORG/NAME": "a model of the Hub; pin its commit with model.revision",
    },
}
"""What there is to choose from, by kind: what each is, by its name."""
NAMED = {"pairs.mode": "modes", "pairs.judge": "judges", "evaluation.benchmarks": "benchmarks"}
"""Settings whose values are the names of a kind; two of them have no list of choices."""


def _first_comment(profile: str) -> str:
    """Return the first sentence of the comment that a profile begins with."""
    text = read_text(PROFILES / f"{profile}.yaml")
    head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ") for line in head).partition(". ")[0].rstrip(".")


JSON = arg.flag("--json", "as JSON, for programs")


@arg.command(
    "list what there is to choose from: names, and what each is",
    "ls benchmarks\n  grath ls",
    arg.argument("kind", metavar="KIND", nargs="*", help=f"{', '.join(KINDS)} (default: all)"),
    JSON,
)
def do_ls(options: argparse.Namespace) -> None:
    for kind in options.kind:
        if kind not in KINDS:
            raise UsageError(f'nothing of the kind "{kind}"{did_you_mean(kind, KINDS)}')
    found = {kind: KINDS[kind]() for kind in options.kind or KINDS}
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    width = max(len(name) for rows in found.values() for name in rows)
    for number, (kind, rows) in enumerate(found.items()):
        if len(found) > 1:
            print(f"{'' if number == 0 else chr(10)}{kind}:")
        for name, about in rows.items():
            print(f"{name:{width}}  {about}")


@arg.command(
    "list every setting with its value in a profile and what it means",
    "options --profile cpu",
    *(arg.PROFILE, JSON),
)
def do_options(options: argparse.Namespace) -> None:
    values, rows = load_config(options.profile).flat(), {}
    for key, default, text in describe_options():
        if key in NAMED and "[" not in text:
            listed = KINDS[NAMED[key]]()
            if key != "evaluation.benchmarks":  # `ls` has what each is
                text = "; ".join(f"`{name}`: {about}" for name, about in listed.items())
            text += f" [{' | '.join(listed)}]"
        rows[key] = {"value": values[key], "default": default, "help": text}
    if options.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for key, row in rows.items():
        print(f"{key} = {row['value']}\n    {row['help']}")


@arg.command(
    "copy a profile into a file of your own to edit, with a schema beside it for your editor",
    "init mine.yaml --profile cpu",
    arg.argument("file", metavar="NAME.yaml", help="a new file", type=arg.file),
    arg.PROFILE,
)
def do_init(options: argparse.Namespace) -> None:
    path = options.file
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{path} is no name for a profile; end it in .yaml")
    if path.exists():
        raise UsageError(f"{path} is there already, and stays as it is; choose another name")
    load_config(options.profile)  # it is one
    own = options.profile in profile_names()
    source = PROFILES / f"{options.profile}.yaml" if own else user_path(options.profile)
    lines = [line for line in read_text(source).splitlines() if "$schema=" not in line]
    head = (
        f"# yaml-language-server: $schema={SCHEMA}",
        f"# From the profile {options.profile}. `grath options --profile {path.name}` lists every",
        "# setting; what is left out here has its default.",
    )
    write_text(path, "\n".join([*head, *lines, ""]))
    schema = path.with_name(SCHEMA)
    if not schema.exists():
        write_json(schema, json_schema())
    print(f"{path}: edit it, then\n  grath run --dry-run --profile {path}")
    print(f"{schema} lets an editor explain and check the settings (VS Code: its YAML extension)")


@arg.command(
    "print a JSON schema of profiles, by which editors explain and check settings",
    "schema",
)
def do_schema(options: argparse.Namespace) -> None:
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def json_schema() -> dict[str, Any]:
    """Return a JSON schema (draft 7) of profiles: keys, types, limits, defaults and help."""
    title = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "a profile of GRATH"}
    return title | _section_schema(Config)


def _section_schema(section: type, prefix: str = "") -> dict[str, Any]:
    kinds, properties = typing.get_type_hints(section), {}
    for each in dataclasses.fields(section):
        kind = kinds[each.name]
        properties[each.name] = (
            _section_schema(kind, f"{each.name}.") | {"type": ["object", "null"]}
            if dataclasses.is_dataclass(kind)
            else _value_schema(each, kind, prefix + each.name)
        )
    about = (section.__doc__ or "").strip()
    return {
        "description": about,
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}
LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum"}


def _value_schema(each: dataclasses.Field, kind: Any, key: str) -> dict[str, Any]:
    facts, none = each.metadata, []
    if isinstance(kind, types.UnionType):  # ``int | None``
        kind, none = typing.get_args(kind)[0], ["null"]
    names = KINDS[NAMED[key]]() if key in NAMED else facts.get("choices", ())
    if key == "pairs.filters":
        names = (*FILTERS, "none")
    choices = {"enum": list(names)} if names else {}
    limits = {LIMITS[limit]: facts[limit] for limit in LIMITS if limit in facts}
    about = {"description": facts["help"], "default": each.default}
    if typing.get_origin(kind) is tuple:  # one name may stand without its brackets
        items = {"type": "string", **choices}
        return {**about, "anyOf": [items, {"type": "array", "items": items, "minItems": 1}]}
    return {**about, "type": [TYPES[kind], *none], **choices, **limits}
