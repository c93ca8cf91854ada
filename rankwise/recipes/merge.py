"""Merge: a run or an adapter folder into an ordinary model folder, with its certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rankwise.data.loader import load_examples
from rankwise.data.rows import expand
from rankwise.errors import RequestError, did_you_mean
from rankwise.export.certificate import MAX_PROBE_TOKENS
from rankwise.export.merged import DTYPES, Merged, Probes, dtype_name, merge_to_folder
from rankwise.files import check_new_folder
from rankwise.models.load import load_config
from rankwise.recipes.fold import folded
from rankwise.recipes.target import Target, find_adapters, open_in, target_head, target_tokenizer

PROBE_TOKENS_EACH = 64
"""A probe from the data is cut here, so that the certificate sees several rows."""
BUILT_IN = "built-in texts"

TEXTS = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "Question: why does ice float on water?\nAnswer: because it is less dense than the liquid that it freezes from.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "In 1905, at the age of 26, he published four papers; the third of them founded what we now call relativity.",
    '{"name": "Ada", "languages": ["English", "French"], "born": 1815, "active": false}',
    "Die Katze sitzt auf der Matte. Le chat est assis sur le tapis. El gato está sentado en la alfombra.",
    "Once upon a time, in a village by the sea, there lived a carpenter who could not keep a secret.",
    "12 + 30 = 42, 7 * 8 = 56, and the square root of two is about 1.41421.",
)
"""Probes for an adapter whose data is not known."""


def merge(
    adapter: str,
    out: str,
    dtype: str | None = None,
    base: str | None = None,
    device: str = "auto",
    task: str | None = None,
) -> dict[str, Any]:
    """The document of `rankwise merge`: `output`, `error`, `update_error`, `certificate`.

    `dtype`: fp32, bf16 or fp16; None takes the base's own. `task`: of a gate's, which is folded first.

    Raises: RequestError for a folder that exists, or an adapter that can't be read; WorkError when the merged model
    differs from the adapter model by more than the bound (nothing is left on disk).
    """
    check_new_folder(out)
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"unknown dtype '{dtype}'{did_you_mean(dtype, DTYPES)}")
    target = find_adapters(adapter, base, device, task)
    with folded(target) as one:
        merged = merge_target(one, out, dtype or stored_dtype(one), target_tokenizer(target))
    return {
        "output": str(merged.folder),
        "error": merged.rounding.error,
        "update_error": merged.rounding.update_error,
        "certificate": merged.certificate.to_dict(),
    }


def merge_target(target: Target, out: str | Path, dtype: str, tokenizer: PreTrainedTokenizerBase) -> Merged:
    """Loads the target in fp32 and merges it. Raises: as `merge`."""
    probes = find_probes(target, tokenizer)
    opened = open_in(target, torch.float32, "fp32")
    return merge_to_folder(opened.model, opened.tokenizer, out, dtype, probes)


def stored_dtype(target: Target) -> str:
    """The dtype that the base's weights are stored in, by its configuration; fp32 where that does not say.

    Raises: RequestError for one that can't be merged into.
    """
    dtype: Any = load_config(target.model).dtype
    return "fp32" if dtype is None else dtype_name(dtype)


def find_probes(target: Target, tokenizer: PreTrainedTokenizerBase) -> Probes:
    """Texts to compare on: rows of the run's test, valid or train file; built-in ones where none of them is here."""
    files = (target.data.test, target.data.valid, target.data.train_paths) if target.data is not None else ()
    file = next((file for file in files if file is not None and _is_here(file)), None)
    if target.data is None or file is None:
        return Probes([tokenizer(text)["input_ids"] for text in TEXTS], BUILT_IN)
    head = target_head(target)
    labels = head.labels if head is not None else None
    loaded = load_examples(file, tokenizer, target.data.for_files(file), target.needs.layout, labels=labels)
    examples = loaded.examples[: MAX_PROBE_TOKENS // PROBE_TOKENS_EACH]
    named = file if isinstance(file, str) else file[0]
    return Probes([example.input_ids[:PROBE_TOKENS_EACH] for example in examples], Path(named).name)


def _is_here(files: str | list[str]) -> bool:
    """Whether data files can be found: a run may have been moved without them."""
    try:
        return bool(expand(files))
    except RequestError:
        return False
