"""Our engine beside others: one table of time, peak memory, ratio, and where the ratio comes from.

Every arm runs in a process of its own, on the same cores, from the same weights and token ids. Its
time is without loading; its memory is the highest of the whole process. A ratio is that of the
tokens that went through the model, times that of the tokens a second: both stand in the table,
with the reason. Needs the development packages; the benchmark mirror (GRATH_MIRROR), else the
project's own probe; and for llama.cpp a Python that has it (GRATH_LLAMA_CPP, as for
tests/engine/test_server.py), else its rows say so. Saves nothing.

    make bench
    python tests/benchmarks/bench.py --model small --questions 64 --items 100 --steps 4
    python tests/benchmarks/bench.py --only pairs --questions 16        # a quick look
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tabulate import tabulate

HERE = Path(__file__).resolve().parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")


@dataclass(frozen=True)
class Arm:
    """A row of the table."""

    part: str  # what is done: the first arm of a part is ours
    name: str
    call: str  # a function of arms.py, or for llama.cpp the format of its weights
    arguments: tuple[Any, ...] = ()
    why: str = ""  # what makes the difference


ARMS = (
    Arm("scoring", "ours", "scoring_ours", (), "each distinct prefix once, many answers a row"),
    Arm("scoring", "lm-eval, batch 8", "scoring_lm_eval", (8,), "a padded row for each answer"),
    Arm("scoring", "lm-eval, auto", "scoring_lm_eval", ("auto",), "the same, larger batches"),
    Arm("scoring", "llama.cpp BF16", "BF16", (), "shared prefixes, one question at a time"),
    Arm("pairs", "ours", "pairs_ours", (), "prompt once, continuous batch, questions guessed"),
    Arm("pairs", "ours, adapter", "pairs_ours", (True,), "a LoRA on q, k and v"),
    Arm("pairs", "generate", "pairs_generate", (), "whole prompts, a batch waits for its last"),
    Arm("pairs", "generate_batch", "pairs_generate_batch", (), "paged cache, made for a GPU"),
    Arm("pairs", "llama.cpp BF16", "BF16", (), "prompt once, 64 slots, nothing guessed"),
    Arm("pairs", "llama.cpp Q4_K_M", "Q4_K_M", (), "the same, a quarter of the weights' bytes"),
    Arm("dpo", "ours", "dpo", ("ours",), "distinct tokens, packed rows"),
    Arm("dpo", "TRL, tuned", "dpo", ("tuned",), "padded rows"),
    Arm("dpo", "TRL", "dpo", ("trl",), "padded rows, reference and checkpointing in each step"),
)
PARTS = ("scoring", "pairs", "dpo")


def main() -> None:
    options = parse()
    if options.child:
        child(options)
        return
    arms = [arm for arm in ARMS if arm.part in options.only]
    with tempfile.TemporaryDirectory() as folder:
        options.job = Path(folder)
        facts = run_here(options, "prepare")
        peak = run_here(options, "floor")
        if "failed" in facts:
            sys.exit(facts["failed"])
        print(
            f"{options.model}, {options.dtype}, {options.device}, {options.threads} threads, "
            f"{peak['rate'] / 1e9:,.0f} GFLOP/s in a matrix product; {facts['items']} items of "
            f"TruthfulQA's form ({facts['source']}), {options.questions} questions, "
            f"{options.steps} steps of {options.batch} pairs",
            flush=True,
        )
        done: dict[Arm, dict[str, Any]] = {}
        for arm in arms:
            done[arm] = run_llama(options, arm) if arm.call.isupper() else run_arm(options, arm)
            shown = done[arm].get("failed") or f"{done[arm]['seconds']:.1f} s"
            print(f"  {arm.part}, {arm.name}: {shown}", file=sys.stderr, flush=True)
        print(table(done, facts, peak), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="default", help="a name, as of --model elsewhere")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="and cores")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--items", type=int, help="of TruthfulQA; all by default")
    parser.add_argument("--questions", type=int, default=128, help="to write pairs for")
    parser.add_argument("--steps", type=int, default=10, help="of the DPO round")
    parser.add_argument("--batch", type=int, default=16, help="pairs a step")
    parser.add_argument("--micro", type=int, default=8, help="of them at a time")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--shape", help="dpo: a Llama of this shape with random weights instead")
    parser.add_argument("--lengths", nargs=3, type=int, help="dpo: random prompt, chosen, rejected")
    parser.add_argument("--quantization", default="none")
    for hidden in ("--child", "--arguments"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- a process for each arm ----------------------------------------------------------------------


def run_arm(options: argparse.Namespace, arm: Arm) -> dict[str, Any]:
    return run_here(options, arm.call, arm.arguments)


def run_here(
    options: argparse.Namespace, call: str, arguments: tuple[Any, ...] = ()
) -> dict[str, Any]:
    """Run a function of arms.py in a process of its own."""
    command = [sys.executable, __file__, "--child", call, "--arguments", json.dumps(arguments)]
    for key in "model dtype device threads items questions steps batch micro job shape".split():
        if (value := getattr(options, key)) is not None:
            command += [f"--{key}", str(value)]
    command += ["--quantization", options.quantization]
    command += ["--lengths", *map(str, options.lengths)] if options.lengths else []
    return result(command, options)


def child(options: argparse.Namespace) -> None:
    """Do one arm, here."""
    # An arm that wants more memory than there is shall fail, and nobody's else process.
    most = int(0.9 * psutil.virtual_memory().available)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    os.sched_setaffinity(0, range(options.threads))
    if options.child.startswith("scoring"):
        os.environ["GRATH_MIRROR"] = str(options.job / "mirror")
    import arms
    import torch

    torch.set_num_threads(options.threads)
    done = getattr(arms, options.child)(options, *json.loads(options.arguments))
    done["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if options.device == "cuda":
        done["peak"] = torch.cuda.max_memory_allocated()
    print("RESULT " + json.dumps(done), flush=True)


def run_llama(options: argparse.Namespace, arm: Arm) -> dict[str, Any]:
    python = os.environ.get("GRATH_LLAMA_CPP")
    if not python:
        return {"failed": "skipped: GRATH_LLAMA_CPP names no Python with llama-cpp-python"}
    script, weights = str(HERE / "llama.py"), options.job / f"{arm.call}.gguf"
    if not weights.exists():
        source = options.gguf or course_gguf(options.model, options.job)
        if source is None:
            return {"failed": "skipped: name the model's GGUF file by --gguf"}
        # Also for BF16, which is then the very weights that we have.
        subprocess.run(
            [python, script, "quantize", str(source), str(weights), arm.call],
            check=True,
            capture_output=True,
        )
    job = options.job / f"{arm.part}.json"
    return result([python, script, arm.part, str(job), str(weights), str(options.threads)], options)


def course_gguf(model: str, folder: Path) -> Path | None:
    """Return the GGUF file that one of the course's own models was made from."""
    sys.path.insert(0, str(HERE.parents[1]))
    from grath_utils.engine.course_models import COURSE_MODELS
    from grath_utils.errors import FetchError

    known = COURSE_MODELS.get("tiny" if model == "default" else model)
    file = folder / "course.gguf"
    for source in known.sources if known and not file.exists() else ():
        with contextlib.suppress(FetchError):
            source.fetch(file, known.size)
            break
    return file if file.exists() else None


def result(command: list[str], options: argparse.Namespace) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    if done.returncode == -signal.SIGKILL:
        return {"failed": "killed, out of memory"}
    return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:100]}


# --- the table -----------------------------------------------------------------------------------


def table(done: dict[Arm, dict[str, Any]], facts: dict[str, Any], peak: dict[str, Any]) -> str:
    """Return the table, and how far each of our own rows is from the floor."""
    ours = {arm.part: row for arm, row in reversed(done.items()) if arm.name == "ours"}
    rows, floors = [], []
    for arm, row in done.items():
        own = ours[arm.part]
        if "failed" in row or "failed" in own:
            rows.append(
                [arm.part, arm.name, *[""] * 5, row.get("failed", "nothing to compare with")]
            )
            continue
        fed = row["tokens"] / own["tokens"]
        ratio = row["seconds"] / own["seconds"]
        cells = [f"{row['seconds']:.1f}", f"{row['peak'] / 2**20:.0f}", f"{ratio:.2f}"]
        cells += [f"{fed:.2f}", f"{fed / ratio:.2f}"]
        same = "" if row is own else f"; {agreement(arm.part, own, row, facts)}"
        rows.append([arm.part, arm.name, *cells, arm.why + same])
        if "operations" in row:
            times = row["seconds"] / (row["operations"] / peak["rate"])
            floors.append(f"{arm.part}, {arm.name}: {times:.2f} times the floor of its products")
    heads = [
        "",
        "arm",
        "seconds",
        "peak MiB",
        "× ours",
        "of it tokens",
        "tokens/s, ours = 1",
        "why",
    ]
    lines = tabulate(rows, heads, tablefmt="github", disable_numparse=True)
    return "\n".join([lines, "", *floors])


def agreement(part: str, ours: dict[str, Any], row: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return in words how near an arm's results are to ours."""
    if part == "pairs":
        theirs = row.get("values") or answers(row, facts)
        pairs = [pair for pair in zip(ours["values"], theirs, strict=True) if pair[0][0]]
        return f"{sum(a == b for a, b in pairs)} of {len(pairs)} pairs are the same"
    flat = [
        [x for value in each["values"] for x in (value if isinstance(value, list) else [value])]
        for each in (ours, row)
    ]
    unit = "nats" if part == "scoring" else "in the loss"
    return f"at most {max(abs(a - b) for a, b in zip(*flat, strict=True)):.2g} {unit} from ours"


def answers(row: dict[str, Any], facts: dict[str, Any]) -> list[list[str | None]]:
    """Return what our parser reads in completions."""
    sys.path.insert(0, str(HERE.parents[1]))
    from transformers import AutoTokenizer

    from grath_utils.pairs.parsing import parse_pair

    texts = row.get("texts")
    if texts is None:
        tokenizer = AutoTokenizer.from_pretrained(facts["folder"])
        texts = tokenizer.batch_decode(row["ids"], skip_special_tokens=True)
    return [[parsed.correct, parsed.incorrect] for parsed in map(parse_pair, texts)]


if __name__ == "__main__":
    main()
