"""GRATH (GRAdual self-truTHifying, arXiv 2401.12292), in rooms that data flows through one way.

No room imports one below it (import-linter holds that, see pyproject.toml)::

    config, errors, text    settings; clear errors; numbers as read
    files        places, whole files, JSON and YAML as read, fingerprints, the journal
    engine       models, encoding, trie, scoring, generation, packing: skip it on first reading
    pairs        questions, prompts, parsing, the ways of writing a pair, their audit
    dpo          the loss, its data, adapters, one round of training, drift
    evaluation   benchmarks, protocols, metrics, rules that never read the question, statistics
    loop         the run directory, the stages of the gradual loop, the choice of the round
    figures      plots of what was measured, drawings of ideas
    scale        what a run costs; grids, sweeps, rounds beside a run
    course       what notebooks show: tables, widgets, dashboard, report, exercises
    workshop     the environment, checkpoints, a classroom without network, rendering, timings
    cli          the command line

Start with pairs, dpo, evaluation and loop. Each room re-exports what notebooks use
(``from grath_utils.pairs import generate_pairs``), and importing one is cheap: torch and its
friends load with the first name that needs them.
"""

import logging
import os

# No network access that the user did not ask for: the libraries below report usage by default.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# On a CPU each number of rows has compiled products of its own. oneDNN keeps them, and torch again:
# 1024 by default, up to a gigabyte for as long as the process lives. 128 are those of some steps.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "128")

# On import, bitsandbytes complains of an optional CPU kernel that is absent.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
