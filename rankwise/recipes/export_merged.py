"""`--to merged`: an ordinary Hugging Face folder, with the certificate of the merge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rankwise.errors import RequestError
from rankwise.export.certificate import trim_probes
from rankwise.export.merged import CERTIFICATE_FILE, DTYPES, write_merged
from rankwise.export.report import Row, size_of
from rankwise.export.speed import paired_ratio, torch_run, what_is_timed
from rankwise.models.quiet import quietly
from rankwise.recipes.export_job import Job, Writer, num_parameters
from rankwise.recipes.merge import stored_dtype
from rankwise.recipes.target import open_in

PROMPT_TOKENS = 24
"""Of the row that is timed."""


def check(job: Job) -> None:
    """Raises: RequestError for a shard size that is none."""
    size = str(job.settings["max_shard_size"])
    if re.fullmatch(r"[1-9]\d*(KB|MB|GB|KiB|MiB|GiB)", size) is None:
        raise RequestError(f"--max-shard-size '{size}' is no size; write a whole number and a unit, as in 500MB or 5GB")


def dtype_of(job: Job) -> str:
    """The dtype asked for, else the one that the base is stored in."""
    return job.settings["dtype"] or stored_dtype(job.target)


def num_bytes(job: Job) -> int:
    """All of the base's numbers in the dtype."""
    return num_parameters(job.target) * DTYPES[dtype_of(job)].itemsize


def write(job: Job, folder: Path) -> Sequence[Row]:
    """Merges in fp32, rounds once, writes, loads again. Raises: WorkError past the certificate's bound."""
    opened = open_in(job.target, torch.float32, "fp32")
    merged = write_merged(
        opened.model, opened.tokenizer, folder, dtype_of(job), job.probes, str(job.settings["max_shard_size"])
    )
    found = merged.certificate
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    prompt = list(trim_probes(job.probes.ids)[0][:PROMPT_TOKENS])
    speedup = _speedup(job, folder, type(opened.model), prompt)
    note = (
        f"{found.dtype}, loaded again by transformers; compared in fp32 arithmetic; speed: "
        f"{what_is_timed(opened.model, prompt)}, in turns with the adapter beside its base, both by torch in fp32"
    )
    if found.dequantised_from is not None:
        note += f"; the base is stored in {found.dequantised_from}, the merged model is not"
    return [
        Row(
            "model.safetensors" if len(shards) == 1 else f"{len(shards)} shards", size_of(folder), ran=True,
            max_abs_diff=found.max_abs_diff, mean_abs_diff=found.mean_abs_diff, kl=found.kl,
            top1_agreement=found.top1_agreement, speedup=speedup, note=note, bounds={"kl": found.bound},
            more={"certificate": CERTIFICATE_FILE, "rounding_error": merged.rounding.error},
        )
    ]  # fmt: skip


def _speedup(job: Job, folder: Path, kind: type[PreTrainedModel], prompt: Sequence[int]) -> float:
    """Of the folder's model over the one that it was made from, loaded again: merging used that up."""
    with quietly():
        merged: Any = kind.from_pretrained(folder, dtype=torch.float32)
    apart = open_in(job.target, torch.float32, "fp32").model
    merged.to(apart.device)
    return paired_ratio(torch_run(apart, prompt), torch_run(merged.eval(), prompt))


MERGED = Writer(check, num_bytes, write, remedy="export with --dtype fp32")
