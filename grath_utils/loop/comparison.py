"""What a run measured: its finished evaluations, and the change from base to chosen model."""

from __future__ import annotations

from typing import Any

from grath_utils.evaluation.measure import compare
from grath_utils.files import read_json
from grath_utils.loop.run_dir import Run
from grath_utils.loop.stages import BASE, evaluated_iterations, final_iteration, model_label


def results(run: Run) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the finished evaluations as ``{benchmark: {model label: result}}``, base first."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in run.config.evaluation.benchmarks:
        for t in evaluated_iterations(run):
            path = run.evaluation(model_label(t), name)
            if path.exists():
                found.setdefault(name, {})[model_label(t)] = read_json(path)
    return found


def comparison_rows(run: Run) -> list[dict[str, Any]]:
    """Return one row per benchmark and metric: base, chosen model, and the paired difference.

    Every number is taken from the evaluation files or computed from their items. Which round was
    chosen is decided by :func:`.stages.choice`, which never sees these numbers.
    """
    rows = []
    labels = (BASE, model_label(final_iteration(run)))
    for benchmark, models in results(run).items():
        if not set(labels) <= models.keys():
            continue
        before, after = (models[label] for label in labels)
        differences = compare(
            before, after, seed=run.config.seed, bootstrap=run.config.evaluation.bootstrap
        )
        for metric in before["metrics"]:
            rows.append(
                {
                    "benchmark": benchmark,
                    "metric": metric,
                    "n": before["metrics"][metric]["n"],
                    "before": before["metrics"][metric],
                    "after": after["metrics"][metric],
                    "difference": differences["metrics"][metric],
                    "labels": labels,
                }
            )
    return rows
