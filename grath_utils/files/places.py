"""Where things are: what a user named, the project's own data, the cache, a benchmark mirror."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from grath_utils.errors import UsageError


def user_path(name: str | os.PathLike[str]) -> Path:
    """Return the absolute path of what a user named, where ``~`` is the home folder."""
    return Path(os.path.realpath(os.path.expanduser(name)))


def data_dir() -> Path:
    """Return the folder with the project's own data (questions, probe, retention set)."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "data", package / "own_data"):  # a checkout, or a wheel
        if (folder / "questions.jsonl").is_file():
            return folder
    raise UsageError(
        f"the project's data folder is missing (looked in {package.parent / 'data'}): "
        "install from a checkout, or restore the folder data/ with git"
    )


def notebooks_dir() -> Path | None:
    """Return the folder with the numbered notebooks, or None outside a checkout."""
    folder = Path(__file__).resolve().parents[2] / "notebooks"
    return folder if folder.is_dir() else None


def cache_dir() -> Path:
    """Return the folder for converted models and other re-creatable files.

    ``GRATH_CACHE`` if set, else the platform's cache folder. It may not exist yet.

    Raises:
        UsageError: the environment says nothing of a home folder.
    """
    try:
        name = os.environ.get("GRATH_CACHE") or platformdirs.user_cache_dir("grath")
        return Path(name).expanduser().resolve()
    except RuntimeError as error:
        raise UsageError(
            "no home folder is known here; set the environment variable GRATH_CACHE to a folder "
            "for the cache"
        ) from error


def mirror_dir() -> Path | None:
    """Return the benchmark mirror that ``GRATH_MIRROR`` names, or None where it is unset."""
    name = os.environ.get("GRATH_MIRROR")
    if not name:
        return None
    folder = user_path(name)
    if not folder.is_dir():
        raise UsageError(
            f"GRATH_MIRROR names {name}, which is not a folder; point it to a benchmark mirror, "
            "or unset it"
        )
    return folder
