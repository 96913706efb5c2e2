"""How a command is declared: above the function that does it.

::

    @command("show where a run stands", "status --run-dir runs/cpu", RUN_DIR)
    def do_status(options: argparse.Namespace) -> None: ...

An argument is a function that adds itself to a parser, so that commands can share it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grath_utils.config import Config
from grath_utils.errors import UsageError, brief

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


def amount(name: str, help: str, *, metavar: str = "N", default: int | None = None) -> Argument:
    """Return an option that counts something, one or more."""
    return option(name, metavar, help, type=whole_number(name), default=default)


def seed(help: str, default: int | None = None) -> Argument:
    """Return the option ``--seed``, with the limits of the setting of that name."""
    limits = Config.__dataclass_fields__["seed"].metadata
    kind = whole_number('"seed"', limits["ge"], limits["le"])
    return argument("--seed", type=kind, default=default, help=help)


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


RUN_DIR = option("--run-dir", "DIR", required=True)
NEW_RUN_DIR = option("--run-dir", "DIR", "default: runs/PROFILE in the checkout")
PROFILE = argument("--profile", default="cpu", help="see grath_utils/profiles (default: cpu)")
SEED = seed("replaces the profile's seed")
SET_HELP = "change settings; `python -m grath_utils options` lists them"
SET = many("--set", "KEY=VALUE", SET_HELP, dest="overrides")
MODEL_HELP = (
    "default, a Hub id, a folder, or RUN_DIR@ITERATION (default: the settings' model.name). A base "
    "model takes quantization, dtype and device from the settings; a run's model and an adapter "
    "bring those that they were made with, and only --set changes them"
)
MODEL = option("--model", "M", MODEL_HELP)
TO = option("--to", "DIR", required=True, type=folder)
