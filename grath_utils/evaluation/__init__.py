"""What the model is measured on, and what the numbers are worth."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "benchmarks": ["BENCHMARKS", "load_benchmark", "reference_questions"],
        "benchmarks.base": ["Item"],
        "blind_rules": ["RULES", "blind_rule_scores", "has_negation"],
        "measure": [
            "RESULT",
            "check_comparable",
            "check_out",
            "compare",
            "evaluate",
            "not_above_rules",
        ],
        "mirror": ["make_mirror"],
        "protocols": ["build_requests", "find_protocol"],
        "statistics": [
            "bootstrap_means",
            "holm",
            "interval",
            "items_needed",
            "mean_interval",
            "paired_difference",
            "smallest_detectable_effect",
            "summarize",
            "t_interval",
        ],
    },
)
