"""One round of direct preference optimisation on the pairs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adapters": ["add_adapter"],
        "data": ["collate", "tokenize_pair", "tokenize_pairs"],
        "drift": ["kl_per_token"],
        "loss": ["completion_log_probs", "dpo_loss"],
        "round": ["check_folder", "reference_log_probs", "train_round"],
    },
)
