"""How a command is declared: above the function that does it.

::

    @command("show where a run stands", "status --run-dir runs/cpu", RUN_DIR)
    def do_status(options: argparse.Namespace) -> None: ...

An argument is a function that adds itself to a parser, so that commands can share it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grath_utils.errors import UsageError

Argument = Callable[[argparse.ArgumentParser], Any]


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
            epilog=f"Example:\n  python -m grath_utils {self.example}",
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
    return lambda parser: parser.add_argument(*names, **settings)


def option(name: str, metavar: str, help: str | None = None, **settings: Any) -> Argument:
    return argument(name, metavar=metavar, help=help, **settings)


def flag(name: str, help: str, **settings: Any) -> Argument:
    return argument(name, help=help, action="store_true", default=None, **settings)


def amount(name: str, help: str, *, metavar: str = "N", default: int | None = None) -> Argument:
    """Return an option that counts something, one or more."""

    def at_least_one(text: str) -> int:
        if int(text) < 1:
            raise UsageError(f"{name} is {text}; the least is 1")
        return int(text)

    return option(name, metavar, help, type=at_least_one, default=default)


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


RUN_DIR = option("--run-dir", "DIR", required=True)
NEW_RUN_DIR = option("--run-dir", "DIR", "default: runs/PROFILE")
PROFILE = argument("--profile", default="cpu", help="see grath_utils/profiles (default: cpu)")
SEED = argument("--seed", type=int, help="replaces the profile's seed")
SET_HELP = "change settings; `python -m grath_utils options` lists them"
SET = many("--set", "KEY=VALUE", SET_HELP, dest="overrides")
MODEL_HELP = "default, a Hub id, a folder, or RUN_DIR@ITERATION (default: default)"
MODEL = option("--model", "M", MODEL_HELP, default="default")
TO = option("--to", "DIR", required=True, type=Path)
