"""Is the Hugging Face Hub within reach, and what of it is on this machine already.

The Hub's client retries for up to a minute where there is no network, and a name lookup can hang for longer. So the
question is asked once in a process, and the whole of it (lookup, connection, answer) gets `LIMIT_SECONDS`.
"""

from __future__ import annotations

import functools
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from .errors import ExperimentError

LIMIT_SECONDS = 3.0


@functools.cache
def obstacle() -> str | None:
    """What stands between this process and the Hub, in words, or None when the Hub answers. Takes at most 3 seconds."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = []
    # In a daemon thread, because no time limit of a socket covers the name lookup.
    asking = threading.Thread(target=lambda: answer.append(_ask(constants.ENDPOINT)), daemon=True)
    asking.start()
    asking.join(LIMIT_SECONDS)
    return answer[0] if answer else f"the Hub gave no answer within {LIMIT_SECONDS:.0f} seconds"


def _ask(endpoint: str) -> str | None:
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=LIMIT_SECONDS).close()
    except urllib.error.HTTPError as error:  # it answered, though not with the page
        return None if error.code < 500 else f"the Hub answered with error {error.code}"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return f"the Hub is out of reach ({str(getattr(reason, 'strerror', None) or reason).lower()})"
    return None


def cached(repo_id: str, needed: Sequence[str], repo_type: str = "model") -> Path | None:
    """The directory of `repo_id` in the Hub's cache, if each pattern of `needed` has a file there; asks no network."""
    try:
        folder = Path(snapshot_download(repo_id, repo_type=repo_type, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None
    return folder if all(any(folder.glob(pattern)) for pattern in needed) else None


def download(repo_id: str, wanted: Sequence[str], repo_type: str = "model") -> Path:
    """Bring the files of `repo_id` that match `wanted` into the Hub's cache; returns their directory.

    Raises:
        ExperimentError: there is no such repository, or it can't be read.
    """
    try:
        return Path(snapshot_download(repo_id, repo_type=repo_type, allow_patterns=list(wanted)))
    except RepositoryNotFoundError:
        raise ExperimentError(f"the Hub has no {repo_type} {repo_id!r} that you may read; check its name") from None
    except Exception as error:  # the client's and its HTTP library's errors share no base
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExperimentError(f"{repo_type} {repo_id!r} could not be downloaded: {reason[0]}") from None
