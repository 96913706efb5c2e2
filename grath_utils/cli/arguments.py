"""How a command is declared: above the function that does it.

::

    @command("show where a run stands", "status runs/cpu", RUN_DIR)
    def do_status(options: argparse.Namespace) -> None: ...

An argument is a function that adds itself to a parser, so that commands can share it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from grath_utils.config import Config
from grath_utils.errors import UsageError, brief, did_you_mean

Argument = Callable[[argparse.ArgumentParser], Any]


class Parser(argparse.ArgumentParser):
    """One whose complaints are errors like all others, and name what may have been meant."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def check_options(self, words: Iterable[str]) -> None:
        """Refuse an option that there is not, before others are missed in its place."""
        known = self._option_string_actions
        for word in words:
            name = word.partition("=")[0]
            is_option = name.startswith("--") and " " not in name
            if is_option and not any(option.startswith(name) for option in known):
                near = did_you_mean(name, (each for each in known if each.startswith("--")))
                raise UsageError(f"{self.prog} has no option {name}{near}")


@dataclass(frozen=True)
class Command:
    work: Callable[[argparse.Namespace], None]
    help: str
    example: str
    arguments: tuple[Argument, ...]

    def add_to(self, commands: argparse._SubParsersAction) -> None:
        parser = commands.add_parser(
            self.work.__name__.removeprefix("do_"),
            help=self.help,
            description=(self.help[0].upper() + self.help[1:] + ".").replace("%%", "%"),
            epilog=f"Example:\n  grath {self.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(command=self)
        for add in self.arguments:
            add(parser)


def command(help: str, example: str, *arguments: Argument) -> Callable[..., Command]:
    """Make a function ``do_NAME`` the command ``NAME``."""
    return lambda work: Command(work, help, example, arguments)


def argument(*names: str, **settings: Any) -> Argument:
    """Return an argument, described as for ``ArgumentParser.add_argument``."""
    choices = settings.get("choices")

    def chosen(text: str) -> str:
        if text not in choices:
            raise UsageError(f'{names[0]} cannot be "{text}"{did_you_mean(text, choices)}')
        return text

    kind = {"type": chosen} if choices else {}
    return lambda parser: parser.add_argument(*names, **kind, **settings)


def option(name: str, metavar: str, help: str | None = None, **settings: Any) -> Argument:
    return argument(name, metavar=metavar, help=help, **settings)


def flag(name: str, help: str, **settings: Any) -> Argument:
    return argument(name, help=help, action="store_true", default=None, **settings)


def whole_number(name: str, least: int = 1, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return the type of an option that takes a whole number."""

    def read(text: str) -> int:
        value: int | str = text
        with suppress(ValueError):
            value = int(text)
        if isinstance(value, str) or not least <= value <= most:
            expected = f"a whole number from {least} to {most}"
            raise UsageError(f"{name} is {brief(value)}; expected {expected}")
        return value

    return read


def amount(name: str, help: str, *, metavar: str = "N", **settings: Any) -> Argument:
    """Return an option that counts something, one or more."""
    return option(name, metavar, help, type=whole_number(name), **settings)


def many(name: str, metavar: str, help: str, **settings: Any) -> Argument:
    """Return an option that takes several values, and may be given several times."""
    return option(name, metavar, help, nargs="+", action="extend", default=[], **settings)


def either(*arguments: Argument) -> Argument:
    """Return arguments of which a user may give one at most."""

    def add(parser: argparse.ArgumentParser) -> None:
        group = parser.add_mutually_exclusive_group()
        for add_one in arguments:
            add_one(group)

    return add


def folder(text: str) -> Path:
    """Read the name of a folder to write; shells leave a ``~`` after ``=`` alone."""
    if not text.strip():
        raise UsageError("the name of what to write is empty; name a file or a folder")
    return Path(os.path.expanduser(text))


def file(text: str) -> Path:
    """Read the name of a file to write."""
    if text.endswith(("/", os.sep)) or (text and not Path(text).name):
        raise UsageError(f"{text} names a folder; name a file")
    return folder(text)


def RUN_DIR(parser: argparse.ArgumentParser) -> None:
    """Take an existing run directory, as a word or after ``--run-dir``: see :func:`settle`."""
    parser.add_argument("run_dir", metavar="RUN_DIR", nargs="?", action="append")
    parser.add_argument("--run-dir", metavar="DIR", action="append", help="the same")
    parser.set_defaults(reads_a_run=True)


def settle(options: argparse.Namespace, left: list[str]) -> None:
    """Find a place for words that argparse has left over, or say that they have none.

    Before Python 3.12 it misses a word that may be left out where an option stands before it.
    """
    example = f"as in `grath {options.command.example.splitlines()[0]}`"
    hint = "; a run directory comes after --run-dir" if "run_dir" in options else ""
    if "reads_a_run" in options:
        named = [*dict.fromkeys(filter(None, [*(options.run_dir or ()), *left]))]
        if not named:
            runs = sorted(str(record.parent) for record in Path("runs").glob("*/run.json"))
            here = f"; here are {', '.join(runs)}" if runs else ""
            raise UsageError(f"name a run directory, {example}{here}")
        options.run_dir, *left = named
        hint = f"; the run directory is {options.run_dir}"
    if left:
        raise UsageError(f"no use for {' '.join(map(brief, left))}{hint}, {example}")


NEW_RUN_DIR = option("--run-dir", "DIR", "default: runs/PROFILE in the checkout")
PROFILE = argument("--profile", default="cpu", help="see grath_utils/profiles (default: cpu)")
_limits = Config.__dataclass_fields__["seed"].metadata
_seed = whole_number('"seed"', _limits["ge"], _limits["le"])
SEED = argument("--seed", type=_seed, help="replaces the profile's seed")
SET_HELP = "change settings; `grath options` lists them"
SET = many("--set", "KEY=VALUE", SET_HELP, dest="overrides")
NAMED_ROUND = "RUN_DIR@N (@0: after round 1)"
MODEL_HELP = (
    f"tiny, small, a Hub id, a folder, or {NAMED_ROUND}; default: the settings' model.name. A base "
    "model takes quantization, dtype and device from the settings; a run's model and an adapter "
    "bring those that they were made with, and only --set changes them"
)
MODEL = option("--model", "M", MODEL_HELP)
TO = option("--to", "DIR", required=True, type=folder)
