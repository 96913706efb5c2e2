"""The gradual loop over a run directory: write pairs, train, write better pairs, train again."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "choice": ["margins", "text_health"],
        "named_models": [
            "choose_model",
            "load_named",
            "load_policy",
            "named_round",
            "resolve_name",
        ],
        "plan": ["check_settings", "plan_stages"],
        "run_dir": [
            "Run",
            "check_not_of_a_run",
            "check_run_dir",
            "environment_facts",
            "load_run",
            "model_label",
        ],
        "stages": [
            "check_ready",
            "evaluate_model",
            "load_model",
            "make_pairs",
            "measure",
            "run_stages",
            "start_run",
            "train_iteration",
        ],
        "state": [
            "choice_line",
            "results",
            "run_pairs",
            "run_questions",
            "run_state",
        ],
        "verdict": ["DISPLACED", "displaced", "gain_line", "verdict", "what_happened"],
    },
)
