"""The command line: ``grath COMMAND``, or ``python -m grath_utils COMMAND``.

Exit codes: 0 done, 2 wrong usage or configuration, 1 failed, 130 interrupted (Ctrl-C), 141 nobody
reads the output any more (``| head -1``), 70 a fault of this program, which alone has a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

from grath_utils import __version__
from grath_utils.cli import runs, settings, steps, workshops
from grath_utils.cli.arguments import Command, Parser, settle
from grath_utils.engine import processes
from grath_utils.errors import GrathError, UsageError, did_you_mean
from grath_utils.files import is_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not so in a notebook
            # Piped output would hold the progress lines back until the end; and what the console
            # cannot show (as on Windows) is escaped.
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    # Where in the program a warning arose tells nothing here.
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        _run(list(sys.argv[1:] if arguments is None else arguments))
        return 0
    except GrathError as error:
        who = "" if processes.is_main() else f" (process {processes.rank()})"
        return _end(f"error{who}: {error}", error.exit_code)
    except KeyboardInterrupt:
        return _end("\ninterrupted: the same command resumes from here", 130)
    except BrokenPipeError:
        # Python would try once more to write what is left, and complain.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _end(f"error: {where}{error.strerror or error}", 1)
    except Exception as error:
        if _ran_out_of_memory(error):
            return _end(f"error: {OUT_OF_MEMORY} ({str(error).partition('. ')[0]})", 1)
        traceback.print_exc()
        return _end(FAULT, 70)


FAULT = (
    "error: this is a fault of grath_utils, not of your input. Please report it, with the lines "
    "above and what `grath env` prints"
)
OUT_OF_MEMORY = (
    "the memory does not suffice. Try smaller batches (pairs.batch_size, dpo.micro_batch_size, "
    "evaluation.batch_tokens), shorter texts or a smaller model"
)


def _end(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _ran_out_of_memory(error: Exception) -> bool:
    """Return True for Python's error and for torch's, without importing torch."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _run(given: list[str]) -> None:
    """Do what the arguments ask for.

    Raises:
        GrathError: it cannot be done.
        SystemExit: the arguments are wrong, or ask for help (argparse).
    """
    for text in given:
        if not is_text(text):
            raise UsageError(
                f"{text!a} is no text in this system's encoding ({sys.getfilesystemencoding()}): "
                "rename what it names, or set PYTHONUTF8=1"
            )
    own = given[: given.index("--")] if "--" in given else given
    parser = build_parser()
    if not own:  # nothing asked for is wrong, so that a script does not take it for done
        print(parser.format_help(), file=sys.stderr)
        raise UsageError("name a command")
    commands = command_parsers(parser)
    if own[0] in commands:
        commands[own[0]].check_options(own[1:])
    elif not own[0].startswith("-"):
        raise UsageError(f'there is no command "{own[0]}"{did_you_mean(own[0], commands)}')
    options, left = parser.parse_known_args(own)
    settle(options, left)
    options.passed_on = given[len(own) + 1 :]
    if len(own) < len(given) and options.command is not runs.do_sweep:
        parser.error('only the command "sweep" takes arguments after --')
    with _together(options):
        options.command.work(options)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all commands."""
    parser = Parser(
        prog="grath",
        description="GRATH, gradual self-truthifying: write pairs, train, evaluate.",
        epilog="Each command has its own --help, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"grath {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (runs, steps, settings, workshops):
        for value in vars(module).values():
            if isinstance(value, Command):
                value.add_to(commands)
    return parser


def command_parsers(parser: Parser) -> dict[str, Parser]:
    """Return the parser of each command by its name."""
    return next(action.choices for action in parser._actions if action.choices)


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
