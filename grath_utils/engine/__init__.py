"""Models, exact shared-prefix computing, decoding: the machinery. Skip it on first reading."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "encoding": ["Request"],
        "generation": ["Stop", "generate", "shared_beginning"],
        "models": [
            "CONVERSION",
            "Policy",
            "load_base",
            "quiet_transformers",
            "resolve",
            "round_weights",
        ],
        "packing": ["pack"],
        "scoring": ["score_completions"],
    },
)
