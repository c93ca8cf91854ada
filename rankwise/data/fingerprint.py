"""Everything that decides which tokens a set of files becomes, as one value: what the cache is keyed by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rankwise.config import to_dict
from rankwise.data.chat_template import read_template
from rankwise.data.config import DataConfig
from rankwise.data.sources import content_hash
from rankwise.data.store import FORMAT
from rankwise.files import sha256_bytes, sha256_file
from rankwise.models.labels import Labels

WITHOUT_EFFECT = (
    "train", "valid", "test", "packing", "workers", "cache", "valid_split", "split_by", "mixing_temperature",
)  # fmt: skip
"""Settings that no token depends on; files count by what is in them, and a column to split by is added."""


def fingerprint(
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    layout: str,
    labels: Labels | None = None,
) -> dict[str, Any]:
    """As JSON's values. `files`: as `expand` gives them; `layout`: how the objective lays rows out, with what `labels`.

    Raises: RequestError when a template or a file can't be read.
    """
    settings = {name: value for name, value in to_dict(config).items() if name not in WITHOUT_EFFECT}
    template = read_template(config.chat_template) if config.has_template_file else tokenizer.chat_template
    parts: dict[str, Any] = {
        "format": FORMAT,
        "code": _code(),
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
        "files": [[file, content_hash(file)] for file in files],
        "settings": settings,
        "group": config.group_column,
        "layout": layout,
        "labels": None if labels is None else [list(labels.names), labels.is_multi],
        "template": template,
        "tokenizer": _tokenizer(tokenizer),
    }
    if "strftime_now" in json.dumps(template):
        parts["date"] = date.today().isoformat()  # the template writes it into the text
    return parts


@cache
def _code() -> str:
    """A hash of this room's own source: what a change of it does to tokens is never taken from before it."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return sha256_bytes("".join(sha256_file(file) for file in files).encode())


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer as it is loaded: what its files say, whatever they are called and wherever they lie."""
    written = ""
    if tokenizer.is_fast:
        backend = cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer
        backend.no_truncation()  # of the last call, not of the tokenizer; each call sets them anew
        backend.no_padding()
        written = backend.to_str()
    return {
        "class": type(tokenizer).__name__,
        "name": Path(tokenizer.name_or_path).name,  # is in messages
        "backend": sha256_bytes(written.encode()),
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "split_special": bool(getattr(tokenizer, "split_special_tokens", False)),
    }
