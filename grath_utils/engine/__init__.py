"""Models, exact shared-prefix computing, decoding: the machinery. Skip it on first reading."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "course_models": ["COURSE_MODELS", "check_machine"],
        "encoding": ["Request", "token_ids"],
        "generation": [
            "Completion",
            "Order",
            "Stop",
            "generate",
            "generate_together",
            "shared_beginning",
        ],
        "int8": ["int8_layers", "multiplied_by"],
        "machine": ["quiet_transformers"],
        "models": ["Policy", "load_base", "pinned", "resolve"],
        "packing": ["pack"],
        "quantization": ["round_weights"],
        "scoring": ["score_completions"],
        "server": ["Server", "connect"],
    },
)
