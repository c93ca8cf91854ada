"""Data sets of the Hugging Face Hub through `datasets`: `hf:owner/name/split`, `hf:owner/name:config@revision/split`.

A data set is fetched once into the local cache and read from there, memory-mapped, a batch of rows at a time. Code that
comes with a data set is never run (`datasets` 4 and later can't). Images and audio are not decoded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from rankwise.data.config import HUB_PREFIX
from rankwise.data.readers.columnar import BATCH_ROWS, rows_of
from rankwise.data.readers.records import Item, Record
from rankwise.errors import RequestError

TIMEOUT_S = 5.0
_REFERENCE = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[^/@:]+))?(?:@(?P<revision>[^/@:]+))?/(?P<split>[^/]+)"
)
_FOLDER = re.compile(r"(?P<name>[./].*?)(?::(?P<config>[^/@:]+))?(?P<revision>)/(?P<split>[^/]+)")


def read_hub(reference: str) -> Iterator[Item]:
    """The rows of a data set; `line` is the row's number.

    Raises: RequestError when `datasets` is not installed, or the data set, configuration or split can't be had.
    """
    first = 1
    for table in load_hub(reference).with_format("arrow").iter(batch_size=BATCH_ROWS):
        yield from rows_of(table, first)
        first += table.num_rows


def hub_hash(reference: str) -> str:
    """SHA-256 of the rows: two fetches of equal rows are equal, whatever files they came in."""
    digest = hashlib.sha256()
    for item in read_hub(reference):
        value = item.value if isinstance(item, Record) else None
        digest.update(json.dumps(value, ensure_ascii=False, default=repr).encode() + b"\n")
    return digest.hexdigest()


def load_hub(reference: str) -> Any:
    """The `datasets.Dataset` that a reference names (a folder in place of `owner/name` is a data set on this disk).

    Raises: as `read_hub`.
    """
    rest = reference.removeprefix(HUB_PREFIX)
    found = (_FOLDER if rest.startswith((".", os.sep)) else _REFERENCE).fullmatch(rest)
    if found is None:
        raise RequestError(
            f"data set '{reference}' must be written {HUB_PREFIX}owner/name/split, as in hf:stanfordnlp/imdb/train; "
            "a configuration follows the name after a colon, a revision after an @"
        )
    try:
        import datasets
    except ImportError:
        raise RequestError(f"data set '{reference}' needs the package datasets: pip install 'rankwise[hub]'") from None
    if found.re is _REFERENCE:
        _check_reachable(reference, found["name"])
    try:
        return datasets.load_dataset(
            found["name"], found["config"], split=found["split"], revision=found["revision"] or None
        )
    except Exception as error:  # noqa: BLE001 (its own errors, the Hub client's and the transport's: no common class)
        text = " ".join(str(error).split())[:300]
        raise RequestError(
            f"data set '{reference}' can't be had: {text}; check its name, configuration and split, and the network"
        ) from None


@cache
def _check_reachable(reference: str, name: str) -> None:
    """One request before `datasets` makes its own, each of which it would try six times over.

    Raises: RequestError when the Hub can't be reached (and HF_HUB_OFFLINE does not say to do without), or says no.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(name, timeout=TIMEOUT_S)
    except HfHubHTTPError as error:
        raise RequestError(f"data set '{reference}' can't be had: {' '.join(str(error).split())[:300]}") from None
    except Exception as error:  # noqa: BLE001 (the transport's errors come through; which, depends on its version)
        raise RequestError(
            f"data set '{reference}' can't be had: the Hub cannot be reached ({type(error).__name__}); with "
            "HF_HUB_OFFLINE=1 a copy in the local cache is used"
        ) from None
