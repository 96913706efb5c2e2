"""Files: where they are, how they are written whole and read, how work is kept for resuming."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "fingerprints": ["fingerprint", "fingerprint_folder", "sha256_file"],
        "journal": ["Journal"],
        "places": ["cache_dir", "data_dir", "mirror_dir", "notebooks_dir", "user_path"],
        "reading": [
            "MAKE_AGAIN",
            "check_form",
            "is_text",
            "parse_json",
            "read_json",
            "read_jsonl",
            "read_text",
        ],
        "whole": [
            "PARTIAL",
            "atomic_path",
            "check_new_folder",
            "check_output",
            "check_place",
            "explained_write_errors",
            "sweep_partials",
            "write_cache",
            "write_json",
            "write_jsonl",
            "write_text",
        ],
        "yaml_1_2": ["parse_yaml", "read_yaml"],
    },
)
