"""The command line: ``python -m grath_utils COMMAND``.

Exit codes: 0 done, 2 wrong usage or configuration, 1 failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

from grath_utils.cli import runs, steps, workshops
from grath_utils.cli.arguments import Command
from grath_utils.engine import processes
from grath_utils.errors import GrathError, UsageError


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    # Piped output would hold the progress lines back until the end.
    sys.stdout.reconfigure(line_buffering=True)
    parser = build_parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    own = given[: given.index("--")] if "--" in given else given
    try:
        options = parser.parse_args(own)
        options.passed_on = given[len(own) + 1 :]
        if len(own) < len(given) and options.command is not runs.do_sweep:
            parser.error('only the command "sweep" takes arguments after --')
        with _together(options):
            options.command.work(options)
    except GrathError as error:
        who = "" if processes.is_main() else f" (process {processes.rank()})"
        print(f"error{who}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted: the same command resumes from here", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m grath_utils",
        description="GRATH, gradual self-truthifying: write pairs, train, evaluate.",
        epilog="Each command has its own --help, with an example.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (runs, workshops, steps):
        for value in vars(module).values():
            if isinstance(value, Command):
                value.add_to(commands)
    return parser


@contextlib.contextmanager
def _together(options: argparse.Namespace) -> Iterator[None]:
    """Meet the other processes of this launch, if there are any; only the main one prints."""
    if processes.launched() == 1:
        yield
        return
    if options.command not in (runs.do_run, steps.do_pairs, steps.do_train, steps.do_evaluate):
        raise UsageError(
            "this command runs in one process: start it without accelerate launch or torchrun"
        )
    if options.command is runs.do_run and not (options.no_notebooks or options.dry_run):
        raise UsageError("several processes cannot share a notebook's kernel: add --no-notebooks")
    processes.join()
    with contextlib.ExitStack() as stack:
        if not processes.is_main():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield
    processes.leave()
