"""What every download from the Hub needs: a bar that comes late, and reasons in plain words."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from grath_utils.errors import reason_of


class LateBar(tqdm):
    """A progress bar that stays away where nothing has to be downloaded."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "delay": 2})

    def display(self, *args: Any, **options: Any) -> bool | None:
        if self._time() - self.start_t > self.delay:
            return super().display(*args, **options)
        return None


def hub_reason(error: Exception) -> str:
    """Return, as part of a sentence, why the Hub could not be used."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        error = error.__cause__ or error
    offline = isinstance(error, errors.OfflineModeIsEnabled)
    return "HF_HUB_OFFLINE is set" if offline else reason_of(error)
