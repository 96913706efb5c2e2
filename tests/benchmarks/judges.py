"""How well each judge tells the project's sealed answers apart, kind by kind::

python tests/benchmarks/judges.py --model small --out notebooks/appendix/judges.jsonl
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from grath_utils.config import ModelConfig, PairsConfig
from grath_utils.engine import load_base
from grath_utils.files import write_jsonl
from grath_utils.pairs import JUDGES, read_sealed, try_judge


def main() -> None:
    """Print a line for each judge and kind, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="small")
    parser.add_argument("--judges", nargs="+", default=list(JUDGES))
    parser.add_argument("--limit", type=int, help="questions of each kind")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    policy, rows = load_base(ModelConfig(name=given.model, dtype="bfloat16")), []
    known = read_sealed()
    for name in given.judges:
        for kind in ("plain", "misconception"):
            some = [(k, sealed) for k, sealed in known.items() if sealed.kind == kind]
            begun = time.perf_counter()
            config = PairsConfig(judge=name)
            trial = try_judge(policy, config, dict(some[: given.limit]))
            row = {
                "judge": name,
                "kind": kind,
                **trial._asdict(),
                "keep": config.judge_keep,
                "swap": config.judge_swap,
                "seconds_a_pair": round((time.perf_counter() - begun) / trial.pairs, 2),
            }
            rows.append(row)
            print(row, f"{trial.accuracy:.3f} {trial.kept_accuracy:.3f}", flush=True)
            if given.out:
                write_jsonl(given.out, rows)


if __name__ == "__main__":
    main()
