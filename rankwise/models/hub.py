"""Whether the Hub's copy of a model can be had: asked once, before transformers asks for each of a model's files.

Without network the Hub's client tries again and again, file by file, for most of a minute; here one request decides.
"""

from __future__ import annotations

from functools import cache
from http import HTTPStatus
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from rankwise.errors import RequestError

CONFIG_FILE = "config.json"
TIMEOUT_S = 5.0


@cache
def is_cut_off(hub_id: str, revision: str | None) -> bool:
    """Whether the Hub cannot be reached, and the model is in the local cache: then nothing else may be asked for.

    Raises: RequestError when the Hub cannot be reached and the model is not in the cache; HfHubHTTPError for what the
        Hub answers: no such model or revision, a gated model.
    """
    try:
        get_hf_file_metadata(hf_hub_url(hub_id, CONFIG_FILE, revision=revision), timeout=TIMEOUT_S)
    except EntryNotFoundError:  # a repository without it: what that means shows when it is loaded
        return False
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status != HTTPStatus.TOO_MANY_REQUESTS and status < HTTPStatus.INTERNAL_SERVER_ERROR:
            raise
        return _in_cache(hub_id, revision, error)
    except Exception as error:  # noqa: BLE001 (the client lets its transport's errors through; which, depends on its version)
        return _in_cache(hub_id, revision, error)
    return False


def snapshot(hub_id: str, revision: str | None) -> Path | None:
    """The folder in the local cache that holds a model's files; its name is the commit. None when it is not there."""
    found = try_to_load_from_cache(hub_id, CONFIG_FILE, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _in_cache(hub_id: str, revision: str | None, error: Exception) -> bool:
    """True. Raises: RequestError when the cache does not have the model."""
    if snapshot(hub_id, revision) is not None:
        return True
    raise RequestError(
        f"model '{hub_id}' is neither a folder here nor in the local Hub cache, and the Hub cannot be reached; "
        f"fetch it once while online (`hf download {hub_id}`), or give a folder"
    ) from error
