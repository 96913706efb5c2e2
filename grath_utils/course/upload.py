"""What leaves a run for the Hub: an adapter, a merged model or pairs, each with its card.

What is uploaded is put together in a folder first, and listed file by file.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from grath_utils.config import ModelConfig
from grath_utils.course.export import merge_model, model_card, on_hub, pairs_card
from grath_utils.engine.course_models import published
from grath_utils.engine.hub import hub_reason
from grath_utils.engine.models import ADAPTER_FILES, ADAPTER_RECORD, merged_before
from grath_utils.errors import FetchError, ModelError, UsageError
from grath_utils.files import cache_dir, read_json, write_json, write_jsonl, write_text
from grath_utils.loop.named_models import named_round
from grath_utils.loop.run_dir import Run
from grath_utils.loop.state import run_pairs
from grath_utils.pairs.preferences import FORMS, preference_row

KINDS = {"adapter": "model", "merged": "model", "pairs": "dataset"}


def push(
    name: str,
    repository: str,
    *,
    what: str = "adapter",
    dtype: str = "float32",
    private: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> str:
    """Upload what a run has made to a repository of the Hub, which is made if it is not there.

    Args:
        name: ``RUN_DIR``, whose chosen round is meant, or ``RUN_DIR@N``.
        repository: ``ORGANISATION/NAME``, or ``NAME`` of one's own.
        what: ``adapter``, ``merged`` (a model that stands alone) or ``pairs`` (a data set).
        dtype: of the merged model's weights.
        private: a repository that has to be made is seen by its owners only.
        dry_run: put everything together, say what it is, and upload nothing.
        say: is told each file and where it goes.

    Returns:
        The address of what was uploaded.

    Raises:
        UsageError: no token, no permission, no such round, or a name that the Hub does not allow.
        ModelError: nobody else could load the adapter.
        FetchError: the Hub cannot be reached, or refuses the upload.
    """
    with _explained(repository):
        validate_repo_id(repository)
    run, iteration = named_round(name)
    api, kind = HfApi(), KINDS[what]
    if not dry_run:
        if get_token() is None:
            raise UsageError(
                "you are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN to a token "
                "with write access; --dry-run shows what would be uploaded"
            )
        with _explained(repository):  # before a merge, which takes minutes
            api.create_repo(repository, repo_type=kind, private=private or None, exist_ok=True)
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".push.", dir=cache_dir()) as scratch:
        folder = Path(scratch) / what
        if what == "merged":
            merge_model(f"{run.path}@{iteration}", folder, dtype=dtype)
            write_text(folder / "README.md", model_card(run, iteration, True, repository))
        else:
            folder.mkdir()
            (_adapter if what == "adapter" else _pairs)(run, iteration, folder, repository)
        if kind == "model" and not dry_run:
            _add_licence(folder / "README.md", run.base_model(), api)
        where = f"{'datasets/' if kind == 'dataset' else ''}{repository}"
        place = f"{constants.ENDPOINT}/{where}"
        say(f"{what} of {run.path}, round {iteration + 1} -> {kind} repository {place}")
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            say(f"  {file.stat().st_size:>13,} bytes  {file.relative_to(folder).as_posix()}")
        if dry_run:
            return place
        with _explained(repository):
            message = f"Round {iteration + 1} of {run.path.name}: {what}"
            api.upload_folder(
                repo_id=repository, folder_path=folder, repo_type=kind, commit_message=message
            )
    return place


def _adapter(run: Run, iteration: int, folder: Path, repository: str) -> None:
    adapter, base = run.adapter(iteration), run.base_model()
    if not on_hub(base):
        raise ModelError(
            f"the adapter belongs to a base model on this machine alone ({base.name}), so nobody "
            "else could load it: push the merged model instead (--merged)"
        )
    if before := merged_before(adapter):
        raise ModelError(
            f"the adapter of round {iteration + 1} stands on {len(before)} earlier one(s), merged "
            "into the base (dpo.chain=merge), so it means nothing by itself: push the merged model "
            "instead (--merged)"
        )
    for name in (*ADAPTER_FILES, ADAPTER_RECORD):
        shutil.copy(adapter / name, folder)
    settings, origin = read_json(folder / ADAPTER_FILES[0], dict), published(base)
    if settings.get("base_model_name_or_path") != origin.name:  # of an older version: `default`
        found = {"base_model_name_or_path": origin.name, "revision": origin.revision}
        write_json(folder / ADAPTER_FILES[0], settings | found)
    write_text(folder / "README.md", model_card(run, iteration, repository=repository))


def _add_licence(page: Path, base: ModelConfig, api: HfApi) -> None:
    """Give a card the licence of its base model, where the Hub knows one."""
    card = ModelCard.load(page)
    if card.data.license is None and on_hub(base):
        with contextlib.suppress(HfHubHTTPError):
            known = api.model_info(base.name, revision=base.revision).card_data
            card.data.license = known and known.license
            card.save(page)


def _pairs(run: Run, iteration: int, folder: Path, repository: str) -> None:
    splits = dict(zip(("train", "held_out"), run_pairs(run, iteration), strict=True))
    for form in FORMS:
        for split, pairs in splits.items():
            rows = [preference_row(pair, form) for pair in pairs]
            write_jsonl(folder / form / f"{split}.jsonl", rows)
    counts = {split: len(pairs) for split, pairs in splits.items()}
    write_text(folder / "README.md", pairs_card(run, iteration, counts, repository))


@contextlib.contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Give whatever keeps the Hub from taking an upload one sentence."""
    try:
        yield
    except HFValidationError as error:
        raise UsageError(
            f'"{repository}" is no name for a repository: it looks like ORGANISATION/NAME, in '
            "letters, digits, - and ."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        refused = {
            401: "the Hub does not know your token: log in again with `hf auth login`, or set "
            "HF_TOKEN to a valid one",
            403: f"your token may not write to {repository}: use one with write access to it, or "
            "push to a repository of your own (`hf auth whoami` says who you are)",
        }
        if status in refused:
            raise UsageError(refused[status]) from error
        raise FetchError(
            f"the Hub did not take the upload to {repository} ({hub_reason(error)}); run the same "
            "again, which sends only what is missing"
        ) from error
    except Exception as error:  # the network fails in many ways
        raise FetchError(
            f"nothing could be uploaded to {repository}: the Hub is not reached "
            f"({hub_reason(error)}). Connect to the network, and run the same again"
        ) from error
