"""The command line: ``python -m grath_utils COMMAND``.

Exit codes: 0 done, 2 wrong usage or configuration, 1 failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from grath_utils.config import (
    Config,
    ModelConfig,
    describe_options,
    load_config,
    parse_overrides,
    profile_names,
)
from grath_utils.engine import processes
from grath_utils.errors import GrathError, UsageError, did_you_mean
from grath_utils.pairs.modes import MODES, describe_modes


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    # Piped output would hold the progress lines back until the end.
    sys.stdout.reconfigure(line_buffering=True)
    parser = build_parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    own = given[: given.index("--")] if "--" in given else given
    options = parser.parse_args(own)
    if "passed_on" in options:
        options.passed_on = given[len(own) + 1 :]
    elif len(own) < len(given):
        parser.error('only the command "sweep" takes arguments after --')
    try:
        with _together(options):
            options.work(options)
    except GrathError as error:
        who = "" if processes.is_main() else f" (process {processes.rank()})"
        print(f"error{who}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _together(options: argparse.Namespace) -> Iterator[None]:
    """Meet the other processes of this launch, if there are any; only the main one speaks."""
    if processes.launched() == 1:
        yield
        return
    if options.work not in (_run, _pairs, _train, _evaluate):
        raise UsageError(
            "this command runs in one process: start it without accelerate launch or torchrun"
        )
    if options.work is _run and not (options.no_notebooks or options.dry_run):
        raise UsageError("several processes cannot share a notebook's kernel: add --no-notebooks")
    processes.join()
    with contextlib.ExitStack() as stack:
        if not processes.is_main():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield
    processes.leave()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m grath_utils",
        description="GRATH, gradual self-truthifying: write pairs, train, evaluate.",
        epilog="Each command has its own --help, with an example.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        _add_env,
        _add_run,
        _add_status,
        _add_report,
        _add_checkpoint,
        _add_render,
        _add_classroom,
        _add_timings,
        _add_sweep,
        _add_pairs,
        _add_train,
        _add_evaluate,
        _add_merge,
        _add_chat,
        _add_mirror,
        _add_options,
    ):
        add(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction,
    name: str,
    work: Callable[[argparse.Namespace], None],
    help: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=(help[0].upper() + help[1:] + ".").replace("%%", "%"),
        epilog=f"Example:\n  python -m grath_utils {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(work=work)
    return parser


# --- env -----------------------------------------------------------------------------------------


def _add_env(commands: argparse._SubParsersAction) -> None:
    _command(
        commands, "env", _env, "print versions, device and caches: what a bug report needs", "env"
    )


def _env(options: argparse.Namespace) -> None:
    from grath_utils import __version__
    from grath_utils.engine.models import CONVERSION, resolve
    from grath_utils.files import cache_dir, data_dir, mirror_dir
    from grath_utils.loop.run_dir import environment_facts

    facts = environment_facts()
    model = resolve(ModelConfig())
    cached = (cache_dir() / CONVERSION / "config.json").is_file()
    print(f"grath_utils {__version__} (profiles: {', '.join(profile_names())})")
    for section in ("versions", "device"):
        print(f"{section}:")
        for key, value in facts[section].items():
            print(f"  {key}: {value}")
    print(f"compute: {model.device}, {model.dtype}")
    print(f"cache: {cache_dir()} (default model {'there' if cached else 'not fetched yet'})")
    print(f"data: {data_dir()}")
    print(f"benchmark mirror (GRATH_MIRROR): {mirror_dir() or 'none'}")


# --- run, status, report -------------------------------------------------------------------------


def _add_run(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "run",
        _run,
        "run the whole course through its notebooks, or go on with an interrupted run",
        "run --profile cpu --run-dir runs/cpu --set dpo.beta=0.05 loop.iterations=3",
    )
    parser.add_argument("--profile", default="cpu", help="see grath_utils/profiles (default: cpu)")
    parser.add_argument("--run-dir", metavar="DIR", help="default: runs/PROFILE")
    parser.add_argument("--seed", type=int, help="replaces the profile's seed")
    _add_set(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--all",
        action="store_true",
        help="execute every numbered notebook, also those after 04: experiments and scaling up",
    )
    which.add_argument(
        "--no-notebooks",
        action="store_true",
        help="do the same stages in this process, without executing notebooks",
    )
    parser.add_argument(
        "--cell-timeout",
        type=int,
        metavar="SECONDS",
        help="stop where one cell of a notebook takes longer (default: no limit)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the stages, what is done, and an estimate of time and memory; do none",
    )


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change settings; `python -m grath_utils options` lists them",
    )


def _run(options: argparse.Namespace) -> None:
    _at_least(options.cell_timeout, 1, "--cell-timeout")
    # Torch loads only after the settings are known to be right.
    config = load_config(options.profile, options.overrides, seed=options.seed)
    if options.dry_run:
        _show_plan(options, config)
        return
    from grath_utils.course.export import model_card
    from grath_utils.course.notebooks import main_line, numbered_notebooks, run_notebooks
    from grath_utils.course.report import summary_table, write_report
    from grath_utils.files import write_text
    from grath_utils.loop.stages import final_iteration, run_stages, start_run

    folder = options.run_dir or Path("runs") / Path(options.profile).stem
    if options.no_notebooks:
        run = start_run(folder, config)
        run_stages(run)
    else:
        notebooks = numbered_notebooks() if options.all else main_line()
        run = start_run(folder, config)
        run_notebooks(run, notebooks, cell_timeout=options.cell_timeout)

    def conclude() -> None:
        write_report(run)
        chosen = final_iteration(run)
        write_text(run.iteration(chosen) / "MODEL_CARD.md", model_card(run, chosen))
        print(f"\nReport: {run.report}\n")
        print(summary_table(run))

    processes.on_main(conclude)


def _show_plan(options: argparse.Namespace, config: Config) -> None:
    from grath_utils.loop.run_dir import Run
    from grath_utils.loop.stages import plan_stages
    from grath_utils.scale import costs
    from grath_utils.scale.shapes import shape_of
    from grath_utils.text import duration

    run = Run(Path(options.run_dir or Path("runs") / Path(options.profile).stem), config)
    plan = plan_stages(run)
    print(f"{run.path} (profile {config.profile}, seed {config.seed}, model {config.model.name})")
    try:
        amounts, shape = costs.workload(config), shape_of(config.model)
    except GrathError as error:  # the plan is still worth seeing
        for stage in plan:
            print(f"  {'done   ' if stage.done else 'to do  '} {stage.name}")
        print(f"no estimate of time and memory: {error}")
        return
    device = costs.this_device(config.model)
    every = replace(config, evaluation=replace(config.evaluation, every_iteration=True))
    expected = {cost.name: cost for cost in costs.estimate(every, device, shape=shape)}
    for stage in plan:
        cost = expected[stage.name]
        about = f"{duration(cost.seconds):>8} {cost.memory / costs.GIB:6.1f} GiB"
        print(f"  {'done   ' if stage.done else 'to do  '} {stage.name:40} {about}")
    for what, amount in amounts.items():
        print(f"{what}: {amount:,}")
    left = costs.total([expected[stage.name] for stage in plan if not stage.done])
    print(
        f"here ({device.name}, {device.peak / 1e9:,.0f} GFLOP/s {device.source}), to do: about "
        f"{duration(left.seconds)}, up to {left.memory / costs.GIB:.1f} GiB"
    )
    print("notebooks do more than the stages: expect up to half as much again")
    if left.memory > device.memory:
        print(f"this machine has {device.memory / costs.GIB:.1f} GiB: it does not fit")
    gpu = costs.meant_for(config.profile)
    if gpu is not None:
        cost = costs.total(costs.estimate(config, gpu, shape=shape))
        print(
            f"on one {gpu.name} (a prediction), all of it: about "
            f"{duration(cost.seconds)}, {cost.memory / costs.GIB:.1f} GiB of GPU memory"
        )


def _add_status(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands, "status", _status, "show where a run stands", "status --run-dir runs/cpu"
    )
    parser.add_argument("--run-dir", metavar="DIR", required=True)


def _status(options: argparse.Namespace) -> None:
    from grath_utils.course.dashboard import choice_line
    from grath_utils.loop.run_dir import load_run
    from grath_utils.loop.stages import plan_stages

    run = load_run(options.run_dir)
    plan = plan_stages(run)
    print(f"{run.path} (profile {run.config.profile}, seed {run.config.seed})")
    for stage in plan:
        print(f"  {'done   ' if stage.done else 'to do  '} {stage.name}")
    done = sum(stage.done for stage in plan)
    print(f"{done} of {len(plan)} stages done")
    print(choice_line(run))


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "report",
        _report,
        "write report.html from what a run directory holds, and print the table",
        "report --run-dir runs/cpu",
    )
    parser.add_argument("--run-dir", metavar="DIR", required=True)


def _report(options: argparse.Namespace) -> None:
    from grath_utils.course.report import summary_table, write_report
    from grath_utils.loop.run_dir import load_run

    run = load_run(options.run_dir)
    write_report(run)
    print(f"Report: {run.report}\n")
    print(summary_table(run))


# --- workshop ------------------------------------------------------------------------------------


def _add_checkpoint(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "checkpoint",
        _checkpoint,
        "make the state that a notebook starts from, to jump right into it",
        "checkpoint --at 03 --profile cpu",
    )
    parser.add_argument(
        "--at", metavar="NN", required=True, help="the notebook: 00, 01, ..., or end"
    )
    parser.add_argument("--profile", help="default: that of --from, or cpu")
    parser.add_argument(
        "--run-dir", metavar="DIR", help="default: the notebooks' own, runs/PROFILE"
    )
    parser.add_argument("--seed", type=int, help="replaces the profile's seed")
    _add_set(parser)
    parser.add_argument(
        "--from",
        dest="source",
        metavar="FOLDER",
        help="copy from a finished run, or from a classroom folder, instead of computing",
    )


def _checkpoint(options: argparse.Namespace) -> None:
    from grath_utils.course.notebooks import changed_parameters, default_run_dir
    from grath_utils.loop.stages import start_run
    from grath_utils.workshop import checkpoints as workshop

    workshop.check_notebook(options.at)
    source = None
    if options.source:
        source = workshop.find_checkpoint(options.source, options.profile)
    chosen = options.profile or options.overrides or options.seed is not None
    if source and not chosen:
        config = source.config
    else:
        config = load_config(options.profile or "cpu", options.overrides, seed=options.seed)
    run = start_run(options.run_dir or default_run_dir(config.profile), config)
    if source:
        workshop.copy_state(run, options.at, source)
    else:
        workshop.make_state(run, options.at)
    print(f"{run.path} is ready for notebook {options.at}")
    for name, value in changed_parameters(run).items():
        print(f"  in its parameters cell: {name} = {value!r}")


def _add_render(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "render",
        _render,
        "write the outputs of a run into the repository's notebooks, cleaned and stamped; execute "
        "only what the run directory lacks",
        "render --profile cpu notebooks/02_qlora_dpo.ipynb",
    )
    parser.add_argument("notebooks", metavar="NOTEBOOK", nargs="*", type=Path, help="default: all")
    parser.add_argument("--profile", default="cpu", help="see grath_utils/profiles (default: cpu)")
    parser.add_argument("--run-dir", metavar="DIR", help="default: runs/PROFILE")
    parser.add_argument("--seed", type=int, help="replaces the profile's seed")
    parser.add_argument(
        "--again", action="store_true", help="take outputs over also where they are up to date"
    )


def _render(options: argparse.Namespace) -> None:
    config = load_config(options.profile, seed=options.seed)
    from grath_utils.loop.stages import start_run
    from grath_utils.workshop.render import render

    folder = options.run_dir or Path("runs") / Path(options.profile).stem
    written = render(start_run(folder, config), options.notebooks, again=options.again)
    print(f"{len(written)} notebooks written")


def _add_classroom(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "classroom",
        _classroom,
        "pack model, packages, notebooks and a finished run into a folder that needs no network",
        "classroom --to classroom --platform win_amd64 macosx_14_0_arm64 --python-version 3.12",
    )
    parser.add_argument("--to", metavar="DIR", required=True, type=Path)
    parser.add_argument("--profile", default="cpu", help="of the run to pack (default: cpu)")
    parser.add_argument(
        "--run-dir", metavar="DIR", help="default: runs/PROFILE; stages it lacks are done first"
    )
    parser.add_argument("--seed", type=int, help="replaces the profile's seed")
    _add_set(parser)
    parser.add_argument(
        "--platform",
        metavar="TAG",
        nargs="+",
        default=[],
        help="pack packages for these, too: win_amd64, macosx_14_0_arm64, manylinux_2_28_x86_64",
    )
    parser.add_argument(
        "--python-version", metavar="X.Y", nargs="+", default=[], help="for each of --platform"
    )
    parser.add_argument(
        "--mirror", metavar="DIR", type=Path, help="pack this mirror (default: GRATH_MIRROR)"
    )
    parser.add_argument("--no-wheels", action="store_true", help="pack no packages")


def _classroom(options: argparse.Namespace) -> None:
    if options.python_version and not options.platform:
        raise UsageError("--python-version goes with --platform; name both")
    config = load_config(options.profile, options.overrides, seed=options.seed)
    from grath_utils.course.notebooks import default_run_dir
    from grath_utils.files import mirror_dir
    from grath_utils.loop.stages import start_run
    from grath_utils.workshop import classroom

    versions = options.python_version or [classroom.this_machine().python]
    targets = [classroom.find_target(tag, v) for tag in options.platform for v in versions]
    run = start_run(options.run_dir or default_run_dir(config.profile), config)
    mirror = options.mirror or mirror_dir()
    folder = classroom.make_classroom(
        options.to, run, targets=targets, mirror=mirror, wheels=not options.no_wheels
    )
    print(f"Give learners the folder {folder}; they begin with START.md")


def _add_timings(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "timings",
        _timings,
        "show how long each section of a run's notebooks took",
        "timings --run-dir runs/cpu --into notebooks/INSTRUCTOR.md",
    )
    parser.add_argument("--run-dir", metavar="DIR", required=True)
    parser.add_argument(
        "--into", metavar="FILE.md", type=Path, help="put the table between the marks of this page"
    )


def _timings(options: argparse.Namespace) -> None:
    from grath_utils.course.notebooks import numbered_notebooks
    from grath_utils.loop.run_dir import load_run
    from grath_utils.workshop import timings

    table = timings.timings_table(load_run(options.run_dir), numbered_notebooks())
    if options.into:
        timings.refresh(options.into, table)
    print(table)


# --- sweep ---------------------------------------------------------------------------------------


def _add_sweep(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "sweep",
        _sweep,
        "run a grid of settings and seeds, sharing what the runs have in common; ends in a table "
        "and a figure",
        "sweep smoke_2x2x2 --out runs/sweep --jobs 2\n"
        "  python -m grath_utils sweep grid.yaml --out runs/sweep -- --executor slurm --jobs 20",
    )
    parser.add_argument(
        "grid", metavar="GRID", help="a YAML file, or an example in grath_utils/sweep"
    )
    parser.add_argument("--out", metavar="DIR", required=True, type=Path)
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=int,
        default=1,
        help="points at a time; each takes the memory of a run (default: 1)",
    )
    parser.add_argument(
        "--here",
        action="store_true",
        help="without Snakemake: one point after the other, in this process",
    )
    parser.add_argument(
        "--plan", action="store_true", help="check the grid, write points.json and stop"
    )
    parser.add_argument(
        "--collect", action="store_true", help="write table, figure and report of what is there"
    )
    # Arguments after -- go to Snakemake; main() puts them here.
    parser.set_defaults(passed_on=[])


def _sweep(options: argparse.Namespace) -> None:
    _at_least(options.jobs, 1, "--jobs")
    from grath_utils.scale import sweeps

    if options.plan or options.collect:
        plan = sweeps.plan_sweep(options.grid, options.out)
        print(sweeps.describe_plan(plan))
        for point in plan["points"] if options.plan else []:
            print(f"  {point['name']}")
        if options.collect:
            print(sweeps.counts(sweeps.collect(options.out)))
    else:
        how = {"here": options.here, "jobs": options.jobs, "extra": options.passed_on}
        sweeps.sweep(options.grid, options.out, **how)
    if not options.plan:
        print(f"\n{(options.out / 'report.md').read_text(encoding='utf-8')}")
        print(f"Table, summary and figure: {options.out}")


# --- single steps --------------------------------------------------------------------------------


def _add_pairs(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "pairs",
        _pairs,
        "let a model write a correct and an incorrect answer to each question",
        "pairs --questions own --limit 50 --out pairs.jsonl",
    )
    parser.add_argument(
        "--questions",
        metavar="SOURCE",
        required=True,
        help="own, arc_challenge, arc_easy, a .jsonl or .csv file, or a Hub data set",
    )
    parser.add_argument("--column", default="question", help="column that holds the question")
    parser.add_argument("--split", default="train", help="split of a Hub data set")
    parser.add_argument("--mode", choices=MODES, help="default: the profile's")
    parser.add_argument("--limit", type=int, metavar="N", help="use N questions, drawn by the seed")
    parser.add_argument("--skip-bad", action="store_true", help="skip and count unusable questions")
    parser.add_argument("--out", metavar="FILE.jsonl", required=True, type=Path)
    _add_model(parser)
    _add_step_settings(parser)


def _add_model(parser: argparse.ArgumentParser, default: str = "default") -> None:
    parser.add_argument(
        "--model",
        metavar="M",
        default=default,
        help="default, a Hub id, a folder, or RUN_DIR@ITERATION (default: %(default)s)",
    )


def _add_step_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", default="cpu", help="where all other settings come from (default: cpu)"
    )
    parser.add_argument("--seed", type=int, help="replaces the profile's seed")
    _add_set(parser)


def _step_config(options: argparse.Namespace, **settings: object) -> Config:
    """Return the profile's configuration with a step's own options and ``--set`` applied."""
    given = {key: value for key, value in settings.items() if value is not None}
    changed = {**given, **parse_overrides(options.overrides)}
    return load_config(options.profile, changed, seed=options.seed)


def _pairs(options: argparse.Namespace) -> None:
    config = _step_config(
        options,
        **{
            "questions.source": options.questions,
            "questions.column": options.column,
            "questions.split": options.split,
            "questions.skip_bad": options.skip_bad or None,
            "pairs.mode": options.mode,
        },
    )
    # A profile's own limit is about its run; here only --limit counts.
    questions_config = replace(config.questions, limit=_at_least(options.limit, 1, "--limit"))
    from grath_utils.loop.named_models import load_policy
    from grath_utils.pairs.generate import generate_pairs
    from grath_utils.pairs.questions import load_questions

    questions = load_questions(questions_config, config.seed)
    print(f"{len(questions)} questions from {questions.source}")
    policy = load_policy(
        options.model, quantization=config.model.quantization, dtype=config.model.dtype
    )
    report = generate_pairs(
        policy,
        questions.questions,
        config.pairs,
        seed=config.seed,
        out=options.out,
        rejects=options.out.with_suffix(".rejects.jsonl"),
        skip_long=config.questions.skip_bad,
    )
    print(report)
    print(f"Pairs: {options.out}")


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "train",
        _train,
        "run one DPO round on a file of pairs",
        "train --pairs pairs.jsonl --out round_0 --set dpo.steps=30",
    )
    parser.add_argument("--pairs", metavar="FILE", required=True, type=Path)
    parser.add_argument("--out", metavar="DIR", required=True, type=Path)
    _add_model(parser)
    parser.add_argument(
        "--held-out",
        type=float,
        metavar="SHARE",
        help="share of the questions kept to measure the margin on (default: the profile's)",
    )
    _add_step_settings(parser)


def _train(options: argparse.Namespace) -> None:
    config = _step_config(options, **{"questions.held_out": options.held_out})
    from grath_utils.pairs.generate import read_pairs

    pairs = read_pairs(options.pairs)
    from grath_utils.dpo.round import train_round
    from grath_utils.engine.models import resolve
    from grath_utils.loop.named_models import resolve_name
    from grath_utils.pairs.questions import split_held_out

    if (options.out / "adapter").exists():
        raise UsageError(f"{options.out / 'adapter'} exists already; choose another --out")
    base, adapters = resolve_name(options.model)
    if not adapters:
        base = replace(config.model, name=base.name)
    train, held_out = split_held_out(pairs, config.questions.held_out, config.seed)
    report = train_round(
        resolve(base),
        train,
        held_out,
        options.out,
        dpo=config.dpo,
        lora=config.lora,
        seed=config.seed,
        previous=adapters[-1] if adapters else None,
    )
    last = report.log[-1]
    print(
        f"{report.pairs} pairs ({report.over_long} over-long left out), "
        f"{report.held_out} held out, {report.steps} steps, "
        f"{report.trainable_parameters:,} trained parameters"
    )
    print(f"Last: loss {last['loss']:.4f}, margin {last['margin']:+.3f} ({last['split']})")
    print(f"Adapter: {options.out / 'adapter'}")


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "evaluate",
        _evaluate,
        "measure a model on a benchmark, with 95 %% intervals and question-blind controls",
        "evaluate --model runs/cpu@1 --benchmark probe --out probe.json",
    )
    _add_model(parser)
    parser.add_argument(
        "--benchmark",
        metavar="B",
        required=True,
        help="truthfulqa_mc, truthfulqa_binary, truthfulqa_gen, arc_challenge, hellaswag, mmlu, "
        "probe, retention",
    )
    parser.add_argument("--protocol", help="how the question is put (default: the benchmark's own)")
    parser.add_argument("--limit", type=int, metavar="N", help="measure N items, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--quantization", choices=("none", "nf4", "fp4", "int8"))
    parser.add_argument("--out", metavar="FILE.json", required=True, type=Path)


def _evaluate(options: argparse.Namespace) -> None:
    from grath_utils.evaluation.benchmarks import BENCHMARKS

    if options.benchmark not in BENCHMARKS:
        near = did_you_mean(options.benchmark, BENCHMARKS)
        raise UsageError(f'unknown benchmark "{options.benchmark}"{near}')
    limit = _at_least(options.limit, 1, "--limit")
    from grath_utils.course.report import metric_line
    from grath_utils.evaluation.measure import evaluate
    from grath_utils.loop.named_models import load_policy

    policy = load_policy(options.model, dtype=options.dtype, quantization=options.quantization)
    result = evaluate(
        policy,
        options.benchmark,
        protocol=options.protocol,
        limit=limit,
        seed=options.seed,
        out=options.out,
    )
    print(f"{result['n']} items from {result['source']}, protocol {result['protocol']}")
    for name, metric in result["metrics"].items():
        print(f"  {name:12} {metric_line(metric)}")
    for note in result["notes"]:
        print(f"  note: {note}")
    print(f"Result: {options.out}")


# --- merge, chat ---------------------------------------------------------------------------------


def _add_merge(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "merge",
        _merge,
        "write a trained model as one that stands alone, with a model card",
        "merge --model runs/cpu@1 --to merged",
    )
    parser.add_argument("--model", metavar="RUN_DIR@ITERATION", required=True)
    parser.add_argument("--to", metavar="DIR", required=True, type=Path)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the written weights; 16 bits round away part of what was learned",
    )


def _merge(options: argparse.Namespace) -> None:
    from grath_utils.course.export import merge_model

    difference = merge_model(options.model, options.to, dtype=options.dtype)
    print(f"{options.to}: a model folder that loads like any other, with README.md as its card")
    print(f"largest difference of a logit to {options.model}: {difference:.2g}")


def _add_chat(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "chat",
        _chat,
        "ask the base model and the trained one the same questions, side by side",
        'chat --run-dir runs/cpu --ask "Do goldfish forget within seconds?"',
    )
    parser.add_argument("--run-dir", metavar="DIR", required=True)
    parser.add_argument(
        "--ask",
        metavar="QUESTION",
        nargs="+",
        action="extend",
        default=[],
        help="questions; without any, they are read from the keyboard, one a line",
    )
    parser.add_argument("--max-new-tokens", type=int, default=60, metavar="N")


def _chat(options: argparse.Namespace) -> None:
    limit = _at_least(options.max_new_tokens, 1, "--max-new-tokens") or 60
    from grath_utils.course.export import ask_both
    from grath_utils.loop.run_dir import load_run

    run = load_run(options.run_dir)
    typed = (line.strip() for line in iter(_read_question, ""))
    for question, before, after in ask_both(run, options.ask or typed, max_new_tokens=limit):
        print(f"\n? {question}\n  base     {before}\n  trained  {after}\n")


def _read_question() -> str:
    """Return a typed question; an empty line or the end of the input ends the conversation."""
    try:
        return input("question (empty line to stop): ").strip()
    except EOFError:
        return ""


def _add_mirror(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "mirror",
        _mirror,
        "copy the benchmarks from the Hub into a folder, for use without network (GRATH_MIRROR)",
        "mirror --to mirror",
    )
    parser.add_argument("--to", metavar="DIR", required=True, type=Path)


def _mirror(options: argparse.Namespace) -> None:
    from grath_utils.evaluation.mirror import make_mirror

    make_mirror(options.to)
    print(f"Mirror: {options.to}. Use it with GRATH_MIRROR={options.to}")


def _add_options(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "options",
        _options,
        "list every setting with its value in a profile and what it means",
        "options --profile cpu",
    )
    parser.add_argument("--profile", default="cpu")


def _options(options: argparse.Namespace) -> None:
    values = load_config(options.profile).flat()
    for key, _, text in describe_options():
        if key == "pairs.mode":
            text = f"{describe_modes()} [{' | '.join(MODES)}]"
        print(f"{key} = {values[key]}\n    {text}")


def _at_least(value: int | None, least: int, name: str) -> int | None:
    if value is not None and value < least:
        raise UsageError(f"{name} is {value}; the least is {least}")
    return value
