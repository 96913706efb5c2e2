"""Write a benchmark mirror from the Hub, for classrooms and machines without network."""

from __future__ import annotations

from pathlib import Path

from tqdm.auto import tqdm

from grath_utils.evaluation.benchmarks import BENCHMARKS
from grath_utils.files import (
    check_new_folder,
    check_output,
    read_json,
    user_path,
    write_json,
    write_jsonl,
)


def make_mirror(to: Path | str, *, progress: bool = True) -> Path:
    """Copy all splits that benchmarks read (118 files, about 70 MB) from the Hub into a folder.

    Each file appears whole or not at all; what is already there is kept, so a second call resumes
    where a first one stopped. Return the folder, to be named by ``GRATH_MIRROR``.

    Raises:
        DataError: a split is gone or empty.
        FetchError: the Hub cannot be reached.
        UsageError: the place is a file, or a folder that holds something else.
    """
    folder = user_path(to)
    files = {file.path: file for row in BENCHMARKS.values() for file in row.files}
    known = {*(Path(path).parts[0] for path in files), "mirror.json"}
    if not folder.is_dir() or not any((folder / name).exists() for name in known):
        check_new_folder(folder)
    check_output(folder / "mirror.json", read_json, ("schema_version", "files"))
    bar = {"desc": f"mirror to {folder.name}", "unit": "file", "disable": not progress}
    for path, file in tqdm(files.items(), **bar):
        if not (folder / path).exists():
            write_jsonl(folder / path, file.from_hub())
    sources = {p: f"{f.dataset}@{f.revision}, {f.config}, {f.split}" for p, f in files.items()}
    write_json(folder / "mirror.json", {"schema_version": 1, "files": sources})
    return folder
