"""GRATH (GRAdual self-truTHifying, arXiv 2401.12292) in small, readable modules.

Data flows one way through the modules, and none imports one further down the line::

    errors, paths, processes, artifacts          what everything stands on
    config, runs                                 settings, and the run directory
    questions, hub_files, benchmarks, mirror     data in
    controls                                     rules that never read the question
    texts, models, prompts, parsing              words; policy = base + quantization + adapter
    encoding, trie, scoring                      log-probabilities, each distinct prefix once
    shared_prefix, generation, vllm_backend      completions over one shared prefix
    writers, pairs, audit                        the model's own correct and incorrect answers
    preferences, packing, global_batch           token ids in rows, over all processes
    tracking, trainer, dpo, drift                token ids, reference, one round of training
    statistics, metrics, protocols               numbers with intervals, and how they are asked for
    partial, answers, evaluation                 results that can be resumed
    selection                                    signs of collapse, and which round to keep
    loop, workshop                               the gradual iterations over a run directory
    shapes, costs                                what a run will take: memory, bytes and time
    plots, drawings, dashboard, report, export   pictures, the page that holds them, the model
    classroom, timings                           the course in one folder; plans for a lesson
    grids, sweep_jobs, sweep_results, sweeps     many runs that share what they can
    experiments                                  such grids beside a run, small
    exercises                                    right or not yet, without giving the answer
    notebooks, widgets, render, cli              the front ends, and notebooks as they are read

Importing the package itself is cheap: torch and its friends load only with the modules that use
them.
"""

import logging
import os

# No network access that the user did not ask for: the libraries below report usage by default.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

# On import, bitsandbytes complains of an optional CPU kernel that is absent.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
