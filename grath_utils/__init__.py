"""GRATH (GRAdual self-truTHifying, arXiv 2401.12292) in small, readable modules.

Data flows one way through the modules, and none imports one further down the line::

    errors, paths, artifacts, config            what everything stands on
    questions, benchmarks, controls             data in
    models                                      policy = base + quantization + adapter
    prompts, scoring                            text in, log-probabilities out
    pairs                                       the model's own correct and incorrect answers
    preferences, trainer, dpo                   token ids, reference, one round of training
    statistics, evaluation                      numbers with intervals
    loop                                        the gradual iterations over a run directory
    plots, report                               pictures and the page that holds them
    notebooks, cli                              the two front ends

Importing the package itself is cheap: torch and its friends load only with the modules that use
them.
"""

import os

# No network access that the user did not ask for: the libraries below report usage by default.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
