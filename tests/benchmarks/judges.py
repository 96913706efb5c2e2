"""How well each judge tells the project's sealed answers apart, kind by kind.

The record ``notebooks/appendix/recipe_sealed.jsonl`` is what ``--model small --every 2 --out FILE``
writes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from grath_utils.config import ModelConfig, PairsConfig
from grath_utils.engine import load_base
from grath_utils.files import write_jsonl
from grath_utils.pairs import JUDGES, read_sealed, try_judge
from grath_utils.pairs.judge import prompts_a_pair


def main() -> None:
    """Print a line for each judge and kind, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="small")
    parser.add_argument("--judges", nargs="+", default=list(JUDGES))
    parser.add_argument("--every", type=int, default=1, help="take each N-th question only")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    policy, rows = load_base(ModelConfig(name=given.model, dtype="bfloat16")), []
    known = dict(list(read_sealed().items())[:: given.every])
    for name in given.judges:
        for kind in ("plain", "misconception"):
            some = {k: sealed for k, sealed in known.items() if sealed.kind == kind}
            begun = time.perf_counter()
            config = PairsConfig(judge=name)
            trial = try_judge(policy, config, some)
            row = {
                "judge": name,
                "kind": kind,
                **trial._asdict(),
                "keep": config.judge_keep,
                "swap": config.judge_swap,
                "prompts_a_pair": prompts_a_pair(config),
            }
            rows.append(row)
            took = (time.perf_counter() - begun) / trial.pairs
            print(row, f"{took:.2f} s a pair", flush=True)
            if given.out:
                write_jsonl(given.out, rows)


if __name__ == "__main__":
    main()
