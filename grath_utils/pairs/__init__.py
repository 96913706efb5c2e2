"""The model's own correct and incorrect answer to every question."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "audit": ["audit_pairs", "embed", "embedding_distance", "wilson"],
        "generate": ["check_outputs", "generate_pairs", "read_pairs"],
        "judge": ["JUDGES", "Case", "find_judge", "letters_question"],
        "labels": ["read_sealed", "relabelled"],
        "modes": ["demonstrations"],
        "overlap": ["overlap_with_benchmarks"],
        "parsing": ["check_pair", "pair_is_complete", "parse_pair"],
        "prompts": [
            "NEUTRAL_QUESTION",
            "answer_messages",
            "pair_messages",
            "question_messages",
            "render_chat",
            "token_ids",
            "training_prompt",
        ],
        "preferences": ["FORMS", "Pair", "preference_row"],
        "questions": ["load_questions", "split_held_out"],
        "words": ["content_words", "negated", "ngram_f1", "split_words"],
    },
)
