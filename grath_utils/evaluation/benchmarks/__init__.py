"""Benchmarks, one file a family and one line here each. CONTRIBUTING.md shows how to add one.

Items come from exactly one of three sources, which is printed and recorded: our own data, a
*mirror* where ``GRATH_MIRROR`` names one, and the Hub otherwise (:mod:`.hub_files`).
"""

from __future__ import annotations

import random
from pkgutil import resolve_name

from grath_utils.errors import ConfigError, DataError, UsageError, did_you_mean
from grath_utils.evaluation.benchmarks.base import Benchmark, BenchmarkSpec
from grath_utils.evaluation.benchmarks.hub_files import is_available, source_of
from grath_utils.files import fingerprint, mirror_dir

_ROWS = (  # module:name
    "truthfulqa:MC",
    "truthfulqa:BINARY",
    "truthfulqa:WRITTEN",
    "arc:CHALLENGE",
    "hellaswag:HELLASWAG",
    "mmlu:MMLU",
    "own:PROBE",
    "own:CHOOSING",
    "own:TESTING",
    "own:RETENTION",
)
BENCHMARKS: dict[str, BenchmarkSpec] = {
    row.name: row for row in (resolve_name(f"{__name__}.{place}") for place in _ROWS)
}


def find_benchmark(name: str, where: str = "") -> BenchmarkSpec:
    """Return a benchmark's row; ConfigError if there is none, with the nearest name.

    ``where`` begins its message: what named the benchmark.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f'{where}unknown benchmark "{name}"{did_you_mean(name, BENCHMARKS)}')
    return BENCHMARKS[name]


def load_benchmark(name: str, *, limit: int | None = None, seed: int = 0) -> Benchmark:
    """Load a benchmark by name, or ``limit`` of its items, drawn by the seed.

    A smaller draw is part of a larger one.

    Raises:
        UsageError: unknown name, or a limit below 1.
        DataError: a file is missing or a row is malformed; file and row are named.
        FetchError: the Hub was needed and cannot be reached.
    """
    spec = find_benchmark(name)
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit}; at least 1 item is needed")
    loaded = spec.load()
    source = source_of(spec.files[0]) if spec.files else "own data"
    chosen = items = loaded.items
    if not items:
        raise DataError(f"{name} ({source}) holds no item")
    if limit is not None and limit < len(items):
        order = list(range(len(items)))
        random.Random(seed).shuffle(order)
        chosen = tuple(items[i] for i in sorted(order[:limit]))
    content = [[(i.question, i.choices, i.labels, i.mc1, i.mc2) for i in chosen]]
    for key, shots in loaded.shots.items():
        content.append([(key, i.question, i.choices, i.labels) for i in shots])
    return Benchmark(
        name=name,
        source=source,
        items=chosen,
        shots=loaded.shots,
        total=len(items),
        limit=limit,
        fingerprint=fingerprint(content),
        notes=loaded.notes,
    )


def reference_questions() -> dict[str, list[str]]:
    """Return the questions of each benchmark at hand: of our own ones, and of those in a mirror.

    Nothing is fetched. Benchmarks that ask the same questions come once, and one whose files the
    mirror does not hold does not come at all.
    """
    found: dict[str, list[str]] = {}
    for name, spec in BENCHMARKS.items():
        if spec.files and mirror_dir() is None:
            continue
        try:
            texts = list(dict.fromkeys(item.question for item in spec.load().items))
        except DataError:
            if all(map(is_available, spec.files)):
                raise
            continue
        if not set().union(*found.values()).issuperset(texts):
            found[name] = texts
    return found
