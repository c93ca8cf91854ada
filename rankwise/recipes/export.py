"""Export: a run or an adapter in a format that other programs run, compared with the model in torch before it is kept.

What every format shares is here: what is asked for is checked, the disk has room, the folder is written under a
temporary name, its report is held against its bounds, and only then is it renamed. How a format is written and checked
is its own module's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.export.formats import known_format, need_package, need_space, settled
from rankwise.export.report import REPORT_FILE, check_bounds
from rankwise.files import check_new_folder, replacing_folder, write_json
from rankwise.recipes.export_gguf import GGUF, GGUF_LORA
from rankwise.recipes.export_job import Job, Writer
from rankwise.recipes.export_merged import MERGED
from rankwise.recipes.export_onnx import ONNX
from rankwise.recipes.export_tensorrt import TENSORRT
from rankwise.recipes.fold import folded
from rankwise.recipes.merge import find_probes
from rankwise.recipes.target import Target, find_adapters, target_tokenizer
from rankwise.say import to_stderr

WRITERS: dict[str, Writer] = {
    "merged": MERGED,
    "onnx": ONNX,
    "gguf": GGUF,
    "gguf-lora": GGUF_LORA,
    "tensorrt": TENSORRT,
}
"""For each of `rankwise.export.formats.FORMATS`."""


def export(
    adapter: str,
    out: str,
    to: str,
    settings: Mapping[str, Any] | None = None,
    base: str | None = None,
    device: str = "auto",
    task: str | None = None,
) -> dict[str, Any]:
    """The document of `rankwise export`: `output`, `format`, `settings`, `probes`, `report`.

    `settings`: those of the format that are not to have their default. `task`: of a gate's, which is folded first.

    Raises: RequestError for a format or setting that is not there, a missing package, a folder that exists, or an
    adapter that can't be read or exported so; WorkError where the disk is too small, or the artefact differs from the
    model in torch by more than its bounds (nothing is left on disk).
    """
    chosen = settled(to, settings or {})
    check_new_folder(out)
    need_package(to)
    with folded(find_adapters(adapter, base, device, task)) as target:
        return _exported(target, out, to, chosen)


def _exported(target: Target, out: str, to: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    tokenizer = target_tokenizer(target)
    writer = WRITERS[to]
    job = Job(target, tokenizer, find_probes(target, tokenizer), chosen, Path(out))
    writer.check(job)
    need_space(out, writer.num_bytes(job))
    for left in sorted(job.out.absolute().parent.glob(f".{job.out.name}.*.tmp")):
        to_stderr(f"note: '{left}' was left by an export that was killed, or is being written by another; remove it")
    to_stderr(f"exporting to {to}: {known_format(to).summary}")
    with replacing_folder(out) as folder:
        rows = writer.write(job, folder)
        check_bounds(rows, writer.remedy)
        document = {
            "output": out,
            "format": to,
            "settings": dict(chosen),
            "probes": job.probes.source,
            "report": [row.to_dict() for row in rows],
        }
        write_json(folder / REPORT_FILE, document)
    return document
