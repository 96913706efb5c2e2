"""The words of mode ``paper`` from a file, so that whoever has another prompt can use it as it is.

``data/prompt_file.yaml`` is an empty one and says what belongs where.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from grath_utils.config import PairsConfig, build_section
from grath_utils.errors import ConfigError
from grath_utils.files import read_yaml
from grath_utils.pairs.parsing import Parsed, parse_pair
from grath_utils.pairs.prompts import Demonstration, Labels, Wording, pair_answer


def read_wording(config: PairsConfig) -> Wording:
    """Return the words of ``config.prompt_file``, or our own where there is none."""
    if config.prompt_file is None:
        return Wording()
    path = config.prompt_file
    tree = read_yaml(Path(path))
    if not isinstance(tree, Mapping) or "instruction" not in tree:
        raise ConfigError(f'{path}: "instruction" is missing')
    rows = tree.get("demonstrations", [])
    if not isinstance(rows, list):
        raise ConfigError(f'{path}: "demonstrations" is no list')
    texts = {key: value for key, value in tree.items() if key != "demonstrations"}
    shots = tuple(
        build_section(Demonstration, row, path, f"demonstrations[{number}].")
        for number, row in enumerate(rows)
    )
    words = build_section(Wording, {"ground_truth": None, **texts}, path)
    words = replace(words, demonstrations=shots)
    if config.shots > len(shots):
        raise ConfigError(
            f'{path}: "demonstrations" has {len(shots)} of them; set pairs.shots={len(shots)}'
        )
    if config.ground_truth and words.ground_truth is None:
        raise ConfigError(f'{path}: "ground_truth" is missing, which pairs.ground_truth=true shows')
    for key, places in (("instruction", ""), ("ground_truth", "correct incorrect")):
        for place in ("question", *places.split()):
            if f"{{{place}}}" not in (getattr(words, key) or f"{{{place}}}"):
                raise ConfigError(f'{path}: "{key}" has no place for the {place}: {{{place}}}')
    for number, shot in enumerate(shots):
        if len(shot.candidates) not in (0, 2):
            key = f"demonstrations[{number}].candidates"
            raise ConfigError(f'{path}: "{key}" must be a right answer and a wrong one')
    answer = pair_answer(Demonstration("Is it so?", "It is.", "No."), words.labels)
    if parse_pair(answer) != Parsed("It is.", "No.", "Is it so?"):
        example = ", ".join(vars(Labels()).values())
        raise ConfigError(f'{path}: "labels" cannot be told in an answer; take {example}')
    return words
