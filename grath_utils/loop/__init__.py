"""The gradual loop over a run directory: write pairs, train, write better pairs, train again."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "choice": ["text_health"],
        "named_models": ["load_policy", "resolve_name"],
        "comparison": ["comparison_rows", "results"],
        "run_dir": ["Run", "environment_facts", "load_run"],
        "stages": [
            "BASE",
            "check_ready",
            "evaluate_model",
            "evaluated_iterations",
            "final_iteration",
            "load_model",
            "make_pairs",
            "measure",
            "model_label",
            "planned_iterations",
            "round_choice",
            "run_pairs",
            "run_questions",
            "run_stages",
            "plan_stages",
            "start_run",
            "train_iteration",
        ],
    },
)
