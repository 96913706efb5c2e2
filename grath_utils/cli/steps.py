"""Commands for single steps: pairs, train, evaluate, merge, push, export, chat, mirror."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from grath_utils import course, dpo, engine, evaluation, loop, pairs
from grath_utils.cli import arguments as arg
from grath_utils.config import (
    Config,
    load_config,
    parse_overrides,
    warn_of_long_warmup,
)
from grath_utils.errors import UsageError
from grath_utils.evaluation.benchmarks import BENCHMARKS, Benchmark
from grath_utils.files import (
    check_output,
    is_text,
    read_json,
    read_jsonl,
    user_path,
    write_jsonl,
)
from grath_utils.pairs.modes import MODES, check_pairs_config
from grath_utils.text import metric_line, quantization_line

DTYPES = ("float32", "bfloat16", "float16")
QUESTIONS_HELP = "own, arc_challenge, arc_easy, a .jsonl or .csv file, or a Hub data set"
OUT_HELP = "an earlier {} there is replaced; any other file is refused"
RESULTS_HELP = f"{OUT_HELP.format('result')}; of several benchmarks, a folder for them"
TRAIN_OUT_HELP = "a new folder, or that of a stopped round, which is resumed"
HELD_OUT_HELP = "of the questions, to measure the margin on (default: the profile's)"
BENCHMARKS_HELP = "; ".join(f"{name}: {row.about}" for name, row in BENCHMARKS.items())
MERGED_HELP = "of the written weights; 16 bits round away part of what was learned"


def _step(options: argparse.Namespace, limited: str | None = None) -> tuple[Config, list[Path]]:
    """Return a step's settings, with its base model, and the adapters that go onto that.

    How many are asked of the section ``limited`` was written for this step, or is all there is: a
    profile's own limit is about its run.
    """
    own = {key: value for key, value in vars(options).items() if "." in key and value is not None}
    settings = parse_overrides(options.overrides)
    for key in own.keys() & settings.keys():
        raise UsageError(f'"{key}" is given twice: by an option of its own, and by --set')
    given = {**own, **settings}
    config = load_config(options.profile or {}, given, seed=options.seed)
    keys = {key.removeprefix("model.") for key in given if key.startswith("model.")}
    base, adapters = loop.choose_model(options.model, config.model, keys)
    config = replace(config, model=base)
    if limited:
        key = f"{limited}.limit"
        if options.limit is not None and key in given:
            raise UsageError(f"both --limit and --set {key} say how many; give one of them")
        section = replace(getattr(config, limited), limit=options.limit or given.get(key))
        config = replace(config, **{limited: section})
    return config, adapters


@arg.command(
    "let a model write a correct and an incorrect answer to each question",
    "pairs --questions own --limit 50 --out pairs.jsonl",
    # The names with a dot are settings.
    arg.option("--questions", "SOURCE", QUESTIONS_HELP, dest="questions.source", required=True),
    arg.option("--column", "NAME", "column that holds the question", dest="questions.column"),
    arg.option("--split", "NAME", "split of a Hub data set", dest="questions.split"),
    arg.argument("--mode", choices=MODES, help="default: the profile's", dest="pairs.mode"),
    arg.amount("--limit", "use N questions, drawn by the seed"),
    arg.flag("--skip-bad", "skip and count unusable questions", dest="questions.skip_bad"),
    arg.option("--out", "FILE.jsonl", OUT_HELP.format("pair file"), required=True, type=arg.file),
    *(arg.MODEL, arg.PROFILE, arg.SEED, arg.SET),
)
def do_pairs(options: argparse.Namespace) -> None:
    config, adapters = _step(options, "questions")
    check_pairs_config(config.pairs)
    rejects = options.out.with_name(f"{options.out.name.removesuffix('.jsonl')}.rejects.jsonl")
    for path in (options.out, rejects):
        loop.check_not_of_a_run(path)
    pairs.check_outputs(options.out, rejects, [user_path(config.questions.source)])
    questions = pairs.load_questions(config.questions, config.seed)
    print(f"{len(questions)} questions from {questions.source}")
    report = pairs.generate_pairs(
        loop.load_named(options.model or config.model.name, config.model, adapters),
        questions.questions,
        config.pairs,
        seed=config.seed,
        out=options.out,
        rejects=rejects,
        skip_long=config.questions.skip_bad,
    )
    print(f"{report}\nPairs: {options.out}")


@arg.command(
    "run one DPO round on a file of pairs",
    "train --pairs pairs.jsonl --out round_0 --set dpo.steps=30",
    arg.option("--pairs", "FILE", required=True, type=Path),
    arg.option("--out", "DIR", TRAIN_OUT_HELP, required=True, type=arg.folder),
    arg.option("--held-out", "SHARE", HELD_OUT_HELP, dest="questions.held_out", type=float),
    *(arg.MODEL, arg.PROFILE, arg.SEED, arg.SET),
)
def do_train(options: argparse.Namespace) -> None:
    config, adapters = _step(options)
    dpo.check_folder(options.out)
    warn_of_long_warmup(config.dpo)
    written = pairs.read_pairs(options.pairs)
    train, held_out = pairs.split_held_out(written, config.questions.held_out, config.seed)
    report = dpo.train_round(
        engine.pinned(engine.resolve(config.model)),
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
        f"{report.pairs} pairs ({report.over_long} over-long left out), {report.held_out} held "
        f"out, {report.steps} steps, {report.trainable_parameters:,} trained parameters\n"
        f"Last: loss {last['loss']:.4f}, margin {last['margin']:+.3f} ({last['split']})\n"
        f"Adapter: {options.out / 'adapter'}"
    )


@arg.command(
    "measure a model on benchmarks, with 95 %% intervals and question-blind controls",
    "evaluate --model runs/cpu@1 --benchmark probe --out probe.json\n"
    "  grath evaluate --model runs/cpu@1 --benchmark probe retention --out results",
    arg.MODEL,
    arg.many("--benchmark", "B", BENCHMARKS_HELP, required=True),
    arg.argument("--protocol", help="how the question is put (default: the benchmark's own)"),
    arg.amount("--limit", "measure N items, drawn by the seed"),
    arg.argument("--dtype", choices=("auto", *DTYPES), dest="model.dtype"),
    arg.argument(
        "--quantization", choices=("none", "nf4", "fp4", "int8"), dest="model.quantization"
    ),
    arg.argument("--profile", help="take the settings from it (default: those of no profile)"),
    *(arg.SEED, arg.SET),
    arg.option("--out", "FILE.json", RESULTS_HELP, required=True, type=arg.file),
)
def do_evaluate(options: argparse.Namespace) -> None:
    config, adapters = _step(options, "evaluation")
    outs = _result_files(options.out, dict.fromkeys(options.benchmark))
    protocols = {name: evaluation.find_protocol(name, options.protocol).name for name in outs}
    for out in outs.values():
        loop.check_not_of_a_run(out)
        evaluation.check_out(out)
    policy = loop.load_named(options.model or config.model.name, config.model, adapters)
    settings = config.evaluation
    for name, out in outs.items():
        how = {"seed": config.seed, "bootstrap": settings.bootstrap, "protocol": protocols[name]}
        benchmark = evaluation.load_benchmark(name, limit=settings.limit, seed=config.seed)
        result = _finished(policy, benchmark, how, out) if len(outs) > 1 else None
        if result is None:
            batch = settings.batch_tokens
            result = evaluation.evaluate(policy, benchmark, batch_tokens=batch, out=out, **how)
        _print_result(result, policy.config.quantization)
        print(f"Result: {out}")


def _result_files(out: Path, benchmarks: Collection[str]) -> dict[str, Path]:
    """Return where each benchmark's result goes: one into the file, several into a folder."""
    several = len(benchmarks) > 1
    if several and (out.suffix == ".json" or out.is_file()):
        such = out.with_suffix("") if out.suffix else "results"
        raise UsageError(
            f"{out} is one file, and {len(benchmarks)} benchmarks are asked for: name a folder, "
            f"such as {such}, which gets a file for each"
        )
    return {name: out / f"{name}.json" if several else out for name in benchmarks}


def _finished(
    policy: engine.Policy, benchmark: Benchmark, how: Mapping[str, Any], out: Path
) -> dict[str, Any] | None:
    """Return the result of an earlier call that was stopped at a later benchmark, if it is there.

    It must be what would be measured now.
    """
    if not out.exists():
        return None
    there = read_json(out)
    model = {key: getattr(policy.config, key) for key in ("quantization", "dtype", "device")}
    model |= {"name": policy.name, "fingerprint": policy.fingerprint}
    same = {**how, "data_fingerprint": benchmark.fingerprint, "limit": benchmark.limit}
    if {key: there.get(key) for key in same} != same or not model.items() <= there["model"].items():
        return None
    print(f"{benchmark.name}: measured already")
    return there


def _print_result(result: Mapping[str, Any], quantization: str) -> None:
    print(f"{result['n']} items from {result['source']}, protocol {result['protocol']}")
    if part := result["model"].get("quantized"):
        print(f"quantization {quantization_line(quantization, part)}")
    for name, metric in result["metrics"].items():
        print(f"  {name:12} {metric_line(metric)}")
    for note in result["notes"]:
        print(f"  note: {note}")


@arg.command(
    "write a trained model as one that stands alone, with a model card",
    "merge --model runs/cpu@1 --to merged",
    arg.option("--model", "RUN_DIR@N", "@0: after round 1", required=True),
    arg.TO,
    arg.argument("--dtype", choices=DTYPES, default=DTYPES[0], help=MERGED_HELP),
)
def do_merge(options: argparse.Namespace) -> None:
    difference = course.merge_model(options.model, options.to, dtype=options.dtype)
    print(
        f"{options.to}: a model folder that loads like any other, with README.md as its card\n"
        f"largest difference of a logit to {options.model}: {difference:.2g}"
    )


WHAT = {"dest": "what", "action": "store_const", "default": "adapter"}
ROUND = f"a run, whose chosen round is meant, or {arg.NAMED_ROUND}"


@arg.command(
    "upload a round of a run to the Hugging Face Hub, with a card: its adapter, or what you say",
    "push runs/cpu@0 --to org/name --merged",
    arg.argument("name", metavar="RUN_DIR[@N]", help=ROUND),
    arg.option("--to", "ORG/NAME", "the repository, made if it is not there", required=True),
    arg.either(
        arg.argument("--merged", help="a model that stands alone", **WHAT, const="merged"),
        arg.argument("--pairs", help="the round's pairs, as a data set", **WHAT, const="pairs"),
    ),
    arg.argument("--dtype", choices=DTYPES, default=DTYPES[0], help=f"merged: {MERGED_HELP}"),
    arg.flag("--private", "make the repository a private one"),
    arg.flag("--dry-run", "list what would be uploaded; upload nothing"),
)
def do_push(options: argparse.Namespace) -> None:
    place = course.push(
        options.name,
        options.to,
        what=options.what,
        dtype=options.dtype,
        private=bool(options.private),
        dry_run=bool(options.dry_run),
    )
    print("Nothing was uploaded (--dry-run)" if options.dry_run else f"Uploaded: {place}")


@arg.command(
    "write pairs as prompt, chosen and rejected, for TRL, LLaMA-Factory and axolotl",
    "export runs/cpu --to pairs.jsonl --form plain",
    arg.argument("name", metavar="PAIRS", help=f"a file of pairs; or {ROUND}"),
    arg.option("--to", "FILE.jsonl", OUT_HELP.format("export"), required=True, type=arg.file),
    arg.argument(
        "--form",
        choices=pairs.FORMS,
        default=pairs.FORMS[0],
        help="lists of messages (TRL; default), or texts (LLaMA-Factory); axolotl takes either",
    ),
)
def do_export(options: argparse.Namespace) -> None:
    from grath_utils.pairs.generate import MARKS

    source, held_out = user_path(options.name), []
    if source.is_file():
        written = pairs.read_pairs(source)
    else:
        written, held_out = loop.run_pairs(*loop.named_round(options.name))
    loop.check_not_of_a_run(options.to)
    own = ("prompt", "chosen", "rejected", "id", "iteration")
    check_output(options.to, read_jsonl, own, [source], allowed={*own, *MARKS})
    write_jsonl(options.to, (pairs.preference_row(pair, options.form) for pair in written))
    left = f"; the {len(held_out)} held out are left out" if held_out else ""
    print(f"{len(written)} pairs{left}\nPairs: {options.to}")


@arg.command(
    "ask the base model and the trained one the same questions, side by side",
    'chat runs/cpu --ask "Do goldfish forget within seconds?"',
    arg.RUN_DIR,
    arg.many("--ask", "QUESTION", "without any, they are read from the keyboard, one a line"),
    arg.amount("--max-new-tokens", "tokens of an answer, at most (default: 60)", default=60),
)
def do_chat(options: argparse.Namespace) -> None:
    run = loop.load_run(options.run_dir)
    answer = course.ask_both(run, max_new_tokens=options.max_new_tokens)
    for question in options.ask or iter(_read_question, ""):
        before, after = answer(question)
        print(f"\n? {question}\n  base     {before}\n  trained  {after}\n")


def _read_question() -> str:
    """Return a typed question; an empty line or the end of the input ends the conversation."""
    try:
        question = input("question (empty line to stop): ").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError:
        question = "\0"  # no text either
    if not is_text(question):
        raise UsageError(f"a question is no text in this system's encoding ({sys.stdin.encoding})")
    return question


@arg.command(
    "copy the benchmarks from the Hub into a folder, for use without network (GRATH_MIRROR)",
    "mirror --to mirror",
    arg.TO,
)
def do_mirror(options: argparse.Namespace) -> None:
    evaluation.make_mirror(options.to)
    print(f"Mirror: {options.to}. Use it with GRATH_MIRROR={options.to}")
