"""Where things are: the project's own data, the cache, and a benchmark mirror."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from grath_utils.errors import UsageError


def data_dir() -> Path:
    """Return the folder with the project's own data (questions, probe, retention set).

    In a checkout this is ``data/`` beside the package; an installed wheel carries a copy inside.
    """
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "data", package / "own_data"):
        if (folder / "questions.jsonl").is_file():
            return folder
    raise UsageError(
        f"the project's data folder is missing (looked in {package.parent / 'data'}): "
        "install from a checkout, or restore the folder data/ with git"
    )


def notebooks_dir() -> Path | None:
    """Return the folder with the numbered notebooks, or None outside a checkout."""
    folder = Path(__file__).resolve().parent.parent / "notebooks"
    return folder if folder.is_dir() else None


def cache_dir() -> Path:
    """Return the folder for converted models and other re-creatable files.

    ``GRATH_CACHE`` if set, else the platform's cache folder. It may not exist yet.
    """
    override = os.environ.get("GRATH_CACHE")
    if override:
        return Path(override).expanduser().resolve()
    return Path(platformdirs.user_cache_dir("grath"))


def mirror_dir() -> Path | None:
    """Return the benchmark mirror that ``GRATH_MIRROR`` names, or None where it is unset.

    Raises:
        UsageError: the variable names a folder that does not exist.
    """
    name = os.environ.get("GRATH_MIRROR")
    if not name:
        return None
    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        raise UsageError(
            f"GRATH_MIRROR names {name}, which is not a folder; point it to a benchmark mirror, "
            "or unset it"
        )
    return folder
