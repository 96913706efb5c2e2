"""The ways of writing pairs, one line each. CONTRIBUTING.md shows how to add one."""

from __future__ import annotations

import json
from dataclasses import replace
from pkgutil import resolve_name

from grath_utils.config import PairsConfig
from grath_utils.errors import ConfigError, did_you_mean
from grath_utils.pairs.judge import find_judge
from grath_utils.pairs.parsing import FILTERS
from grath_utils.pairs.prompt_file import read_wording
from grath_utils.pairs.prompts import Demonstration, Labels
from grath_utils.pairs.writers import PairMode

_ROWS = (  # module:name
    "default:MODE",
    "paper:PAPER",
    "paper:SENTENCES",
    "pick:MODE",
    "controls:GOLD",
    "controls:RANDOM",
)
SWITCHES = ("legacy", "annotated", "ground_truth", "prompt_file", "self_check", "judge")
MODES: dict[str, PairMode] = {
    mode.name: mode for mode in (resolve_name(f"{__package__}.{row}") for row in _ROWS)
}


def find_mode(name: str) -> PairMode:
    """Return a mode's row, or raise :class:`ConfigError` with the nearest name."""
    if name not in MODES:
        raise ConfigError(f'"pairs.mode" cannot be "{name}"{did_you_mean(name, MODES)}')
    return MODES[name]


def check_pairs_config(config: PairsConfig) -> PairMode:
    """Return the row of the mode; settings that cannot go together are a :class:`ConfigError`."""
    mode = find_mode(config.mode)
    valid = [*FILTERS, "none"]
    for name in config.filters:
        if name not in valid or (name == "none" and len(config.filters) > 1):
            raise ConfigError(f'"pairs.filters" cannot hold "{name}"{did_you_mean(name, valid)}')
    for key in SWITCHES:
        usual = getattr(PairsConfig, key)
        if getattr(config, key) != usual and key not in mode.options:
            out = json.dumps(usual).strip('"')  # as it is written in a profile or after --set
            heeding = " or ".join(row.name for row in MODES.values() if key in row.options)
            raise ConfigError(
                f'"pairs.{key}" belongs to pairs.mode={heeding}; with {config.mode} leave it out '
                f"(pairs.{key}={out})"
            )
    if config.annotated and (config.ground_truth or config.prompt_file):
        raise ConfigError(
            '"pairs.annotated" has no place beside "pairs.ground_truth" or "pairs.prompt_file"'
        )
    if (config.backend == "server") != bool(config.server_url):
        raise ConfigError(
            '"pairs.backend=server" and "pairs.server_url" (such as http://localhost:8000/v1) '
            "belong together: give both or neither"
        )
    find_judge(config)
    labels = read_wording(config).labels
    if config.legacy and replace(labels, question=Labels.question) != Labels():
        raise ConfigError(
            f'"pairs.legacy" reads answers after "{Labels.correct}" and "{Labels.incorrect}" only; '
            f'leave "labels" out of {config.prompt_file}, or pairs.legacy'
        )
    return mode


def demonstrations(mode: str, kind: str, shots: int) -> tuple[Demonstration, ...]:
    """Return the first ``shots`` demonstrations of a mode for ``pair`` or ``single`` answers."""
    return find_mode(mode).writer.demonstrations(kind, shots)
