"""Commands about whole runs: env, run, status, report, sweep."""

from __future__ import annotations

import argparse
import json

from grath_utils import __version__, course, engine, loop, scale
from grath_utils.cli import arguments as arg
from grath_utils.cli.settings import JSON
from grath_utils.config import ModelConfig, load_config, profile_names, warn_of_long_warmup
from grath_utils.engine import processes
from grath_utils.errors import GrathError
from grath_utils.files import cache_dir, data_dir, mirror_dir, write_text
from grath_utils.text import duration


@arg.command("print versions, device and caches: what a bug report needs", "env")
def do_env(options: argparse.Namespace) -> None:
    facts = loop.environment_facts()
    model = engine.resolve(ModelConfig())
    models = [
        f"{own.name} {'there' if own.is_cached() else 'not fetched yet'}"
        for own in engine.COURSE_MODELS.values()
    ]
    print(f"grath_utils {__version__} (profiles: {', '.join(profile_names())})")
    for section in ("versions", "device"):
        print(f"{section}:")
        for key, value in facts[section].items():
            print(f"  {key}: {value}")
    print(f"compute: {model.device}, {model.dtype}")
    print(f"cache: {cache_dir()} (models: {', '.join(models)})")
    print(f"data: {data_dir()}")
    print(f"benchmark mirror (GRATH_MIRROR): {mirror_dir() or 'none'}")


@arg.command(
    "run the whole course through its notebooks, or resume an interrupted run",
    "run --profile cpu --run-dir runs/cpu --set dpo.beta=0.05 loop.iterations=3",
    *(arg.PROFILE, arg.NEW_RUN_DIR, arg.SEED, arg.SET),
    arg.either(
        arg.flag("--all", "execute the notebooks after 04, too: experiments and scaling up"),
        arg.flag("--no-notebooks", "do the same stages without executing notebooks"),
    ),
    arg.amount(
        "--cell-timeout", "stop if a cell takes longer (default: no limit)", metavar="SECONDS"
    ),
    arg.flag("--dry-run", "show what is to do, with an estimate of time and memory; do nothing"),
)
def do_run(options: argparse.Namespace) -> None:
    config = load_config(options.profile, options.overrides, seed=options.seed)
    folder = options.run_dir or course.default_run_dir(options.profile)
    if options.dry_run:
        loop.check_settings(config)
        warn_of_long_warmup(config.dpo)
        _show_plan(loop.check_run_dir(folder, config))
        return
    engine.check_machine(config.model)
    notebooks = []
    if not options.no_notebooks:
        notebooks = course.numbered_notebooks() if options.all else course.main_line()
    run = loop.start_run(folder, config)
    course.run_notebooks(run, notebooks, cell_timeout=options.cell_timeout)
    loop.run_stages(run)  # without notebooks all of them, else what was deleted since

    def conclude() -> None:
        chosen = loop.run_state(run).final
        write_text(run.iteration(chosen) / "MODEL_CARD.md", course.model_card(run, chosen))
        print()
        _report(run)

    processes.on_main(conclude)


def _report(run: loop.Run) -> None:
    state = loop.run_state(run)
    course.write_report(state)
    print(f"Report: {run.report}\n\n{course.summary_table(state)}")


def _line(done: bool, title: str) -> str:
    return f"  {'done' if done else 'to do':7} {title}"


def _show_plan(run: loop.Run) -> None:
    config, costs, plan = run.config, scale.costs, loop.plan_stages(run)
    print(f"{run.path} (profile {config.profile}, seed {config.seed}, model {config.model.name})")
    try:
        amounts, shape = costs.workload(config), scale.shape_of(config.model)
    except GrathError as error:  # the plan is still worth seeing
        print(*(_line(stage.done, stage.title) for stage in plan), sep="\n")
        print(f"no estimate of time and memory: {error}")
        return
    device = costs.this_device(config.model)
    model = costs.CostModel(config, device, shape)
    expected = [(stage, model.stage(stage)) for stage in plan]
    for stage, cost in expected:
        about = f"{duration(cost.seconds):>8} {cost.memory / costs.GIB:6.1f} GiB"
        print(_line(stage.done, f"{stage.title:40} {about}"))
    for what, count in amounts.items():
        print(f"{what}: {count:,}")
    left = costs.total([cost for stage, cost in expected if not stage.done])
    print(
        f"here ({device.name}, {device.peak / 1e9:,.0f} GFLOP/s {device.source}), to do: about "
        f"{duration(left.seconds)}, up to {left.memory / costs.GIB:.1f} GiB"
    )
    print("notebooks do more than the stages: expect up to half as much again")
    if left.memory > device.memory:
        print(f"this machine has {device.memory / costs.GIB:.1f} GiB: it does not fit")
    if gpu := costs.meant_for(config.profile):
        cost = costs.total(costs.estimate(config, gpu, shape=shape))
        print(
            f"on one {gpu.name} (a prediction), all of it: about {duration(cost.seconds)}, "
            f"{cost.memory / costs.GIB:.1f} GiB of GPU memory"
        )


@arg.command("show where a run stands", "status runs/cpu", arg.RUN_DIR, JSON)
def do_status(options: argparse.Namespace) -> None:
    run = loop.load_run(options.run_dir)
    config, state = run.config, loop.run_state(run)
    plan = loop.plan_stages(state)
    done = sum(stage.done for stage in plan)
    said = (
        loop.verdict(state),
        loop.gain_line(state),
        *loop.what_happened(state),
        loop.choice_line(state),
    )
    exercises = course.exercises_line(run)
    if options.json:
        found = {
            "run": str(run.path),
            "profile": config.profile,
            "seed": config.seed,
            "done": done,
            "stages": [{"id": s.id, "title": s.title, "done": s.done} for s in plan],
            "chosen_round": state.choice and state.choice.iteration,
            "said": [*filter(None, said)],
            "exercises": course.read_progress(run),
        }
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    print(f"{run.path} (profile {config.profile}, seed {config.seed})")
    print(*(_line(stage.done, stage.title) for stage in plan), sep="\n")
    print(f"{done} of {len(plan)} stages done")
    print(*filter(None, (*said, exercises)), sep="\n")


@arg.command(
    "write report.html from what a run directory holds, and print the table",
    "report runs/cpu",
    arg.RUN_DIR,
)
def do_report(options: argparse.Namespace) -> None:
    _report(loop.load_run(options.run_dir))


@arg.command(
    "run a grid of settings and seeds, sharing what the runs have in common; ends in a table "
    "and a figure",
    "sweep smoke_2x2x2 --out runs/sweep --jobs 2\n"
    "  grath sweep grid.yaml --out runs/sweep -- --executor slurm --jobs 20",
    arg.argument("grid", metavar="GRID", help="a YAML file, or an example in scale/grid_files"),
    arg.option("--out", "DIR", required=True, type=arg.folder),
    arg.amount("--jobs", "points at a time, each as large as a run (default: 1)", default=1),
    arg.flag("--here", "without Snakemake: one point after the other, in this process"),
    arg.flag("--plan", "check the grid, write points.json and stop"),
    arg.flag("--collect", "write table, figure and report of what is there"),
)
def do_sweep(options: argparse.Namespace) -> None:
    sweeps = scale.sweeps
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
