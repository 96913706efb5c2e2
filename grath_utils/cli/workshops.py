"""Commands for those who teach: checkpoint, render, classroom, timings."""

from __future__ import annotations

import argparse
from pathlib import Path

from grath_utils import course, loop, workshop
from grath_utils.cli import arguments as arg
from grath_utils.config import load_config
from grath_utils.errors import UsageError
from grath_utils.files import mirror_dir


@arg.command(
    "make the state that a notebook starts from, to jump right into it",
    "checkpoint --at 03 --profile cpu",
    arg.option("--at", "NN", "the notebook: 00, 01, ..., or end", required=True),
    arg.argument("--profile", help="default: that of --from, or cpu"),
    *(arg.NEW_RUN_DIR, arg.SEED, arg.SET),
    arg.option("--from", "FOLDER", "copy from a finished run or classroom folder", dest="source"),
)
def do_checkpoint(options: argparse.Namespace) -> None:
    checkpoints = workshop.checkpoints
    checkpoints.check_notebook(options.at)
    source = options.source and checkpoints.find_checkpoint(options.source, options.profile)
    if source and not (options.profile or options.overrides or options.seed is not None):
        config = source.config
    else:
        config = load_config(options.profile or "cpu", options.overrides, seed=options.seed)
    run = loop.start_run(options.run_dir or course.default_run_dir(config.profile), config)
    if source:
        checkpoints.copy_state(run, options.at, source)
    else:
        checkpoints.make_state(run, options.at)
    print(f"{run.path} is ready for notebook {options.at}")
    for name, value in course.changed_parameters(run).items():
        print(f"  in its parameters cell: {name} = {value!r}")


@arg.command(
    "write the outputs of a run into the repository's notebooks, cleaned and stamped; execute "
    "only what the run directory lacks",
    "render --profile cpu notebooks/02_qlora_dpo.ipynb",
    arg.argument("notebooks", metavar="NOTEBOOK", nargs="*", type=Path, help="default: all"),
    *(arg.PROFILE, arg.NEW_RUN_DIR, arg.SEED),
    arg.flag("--again", "take outputs over even if they are up to date"),
)
def do_render(options: argparse.Namespace) -> None:
    config = load_config(options.profile, seed=options.seed)
    run = loop.start_run(options.run_dir or course.default_run_dir(config.profile), config)
    written = workshop.render.render(run, options.notebooks, again=options.again)
    print(f"{len(written)} notebooks written")


@arg.command(
    "pack model, packages, notebooks and a finished run into a folder that needs no network",
    "classroom --to classroom --platform win_amd64 macosx_14_0_arm64 --python-version 3.12",
    *(arg.TO, arg.PROFILE, arg.NEW_RUN_DIR, arg.SEED, arg.SET),
    arg.many("--platform", "TAG", "pack packages for win_amd64, manylinux_2_28_x86_64, ..., too"),
    arg.many("--python-version", "X.Y", "for each of --platform"),
    arg.option("--mirror", "DIR", "pack this mirror (default: GRATH_MIRROR)", type=Path),
    arg.flag("--no-wheels", "pack no packages"),
)
def do_classroom(options: argparse.Namespace) -> None:
    if options.python_version and not options.platform:
        raise UsageError("--python-version goes with --platform; name both")
    config = load_config(options.profile, options.overrides, seed=options.seed)
    classroom = workshop.classroom
    here = classroom.this_machine()
    versions = options.python_version or [here.python]
    others = [classroom.find_target(tag, v) for tag in options.platform for v in versions]
    targets = [] if options.no_wheels else [here, *others]
    mirror = options.mirror or mirror_dir()
    classroom.check_possible(options.to, config, mirror)
    run = loop.start_run(options.run_dir or course.default_run_dir(config.profile), config)
    folder = classroom.make_classroom(options.to, run, targets=targets, mirror=mirror)
    print(f"Give learners the folder {folder}; they begin with START.md")


@arg.command(
    "show how long each section of a run's notebooks took",
    "timings runs/cpu --into notebooks/INSTRUCTOR.md",
    arg.RUN_DIR,
    arg.option("--into", "FILE.md", "put the table between the marks of this page", type=Path),
)
def do_timings(options: argparse.Namespace) -> None:
    run = loop.load_run(options.run_dir)
    table = workshop.timings.timings_table(run, course.numbered_notebooks())
    if options.into:
        workshop.timings.refresh(options.into, table)
    print(table)
