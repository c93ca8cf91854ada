"""`--to onnx`: one graph with a cache for prefill and decode, adapters that can be switched beside it, 8 or 4 bits.

What is asked for is checked here, before torch's exporter and ONNX's packages are imported.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from rankwise.errors import RequestError
from rankwise.export.onnx_folder import BASE, GRAPH_FILES, need_packages
from rankwise.export.report import Row, size_of
from rankwise.recipes.export_job import Job, Writer, num_parameters
from rankwise.recipes.target import Target, find_adapter
from rankwise.train.state import ADAPTER

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def adapter_name(target: Target) -> str:
    """What the exported adapter is called: its run's folder, or its own."""
    folder = Path(target.name).expanduser().absolute()
    return folder.parent.name if folder.name == ADAPTER else folder.name


def adapters_of(job: Job) -> dict[str, Target]:
    """The adapters to export, by name: the target's, and those of `--adapters name=path`.

    Raises: RequestError for a name that can't be one or stands twice, a folder that can't be read, or another base.
    """
    found = {checked_name(adapter_name(job.target)): job.target}
    for entry in job.settings["adapters"] or ():
        name, equals, path = str(entry).partition("=")
        if not equals:
            raise RequestError(f"--adapters '{entry}' has no name; write name=path")
        if checked_name(name) in found:
            raise RequestError(f"--adapters: the name '{name}' stands twice; give each adapter a name of its own")
        other = find_adapter(path, device=job.target.model.device)
        if other.model.name != job.target.model.name:
            raise RequestError(
                f"--adapters {name}: its base is '{other.model.name}', that of '{job.target.name}' is "
                f"'{job.target.model.name}'; adapters on one graph share their base"
            )
        found[name] = dataclasses.replace(other, model=job.target.model)
    return found


def checked_name(name: str) -> str:
    """Raises: RequestError for a name that would not be a file's."""
    if NAME.fullmatch(name) is None or name == BASE:
        raise RequestError(
            f"'{name}' can't be an adapter's name: letters, digits, '.', '_' and '-', a letter or digit first, and not "
            f"'{BASE}'"
        )
    return name


def precision_of(job: Job) -> str:
    """`fp32`, `int8`, `int8-full` or `int4`. Raises: RequestError for two at once."""
    int8, int4 = job.settings["int8"], job.settings["int4"]
    if int8 and int4:
        raise RequestError("--int8 and --int4 both say how weights are stored; give one")
    if int4:
        return "int4"
    return {None: "fp32", "weights": "int8", "full": "int8-full"}[int8]


def check(job: Job) -> None:
    """Raises: RequestError for settings that don't go together, a model that can't be exported, a missing package."""
    need_packages()
    precision, settings = precision_of(job), job.settings
    if settings["max_kl"] is not None and precision == "fp32":
        raise RequestError("--max-kl has no effect without --int8 or --int4: an fp32 graph has a bound of its own")
    if settings["max_kl"] is not None and not float(settings["max_kl"]) > 0:
        raise RequestError(f"--max-kl must be above 0, not {settings['max_kl']}")
    if settings["merged"] and settings["adapters"]:
        raise RequestError("--merged folds one adapter into the graph, so --adapters has no effect; leave one out")
    if job.target.model.is_quantized and not settings["merged"]:
        raise RequestError(
            f"the base of '{job.target.name}' is loaded in {job.target.model.quantization}, which no graph with "
            "switchable adapters can hold; export it with --merged, which dequantises it"
        )
    adapters_of(job)


def num_bytes(job: Job) -> int:
    """The fp32 graph, which a quantised one is made from and stands beside for a while, and the adapters twice over.

    Both graphs of an encoder-decoder model hold the embedding, which may be half of a small one.
    """
    share = {"fp32": 1.0, "int8": 1.3, "int8-full": 1.3, "int4": 1.2}[precision_of(job)]
    share *= 1.5 if job.target.needs.task in GRAPH_FILES else 1.0
    adapters = sum(2 * size_of(target.adapter) for target in adapters_of(job).values() if target.adapter is not None)
    return int(num_parameters(job.target) * 4 * share) + adapters


def write(job: Job, folder: Path) -> Sequence[Row]:
    """See `recipes.export_onnx_write`."""
    from rankwise.recipes.export_onnx_write import write_onnx

    return write_onnx(job, adapters_of(job), precision_of(job), folder)


ONNX = Writer(check, num_bytes, write, remedy="export without --int8 or --int4, or allow more with --max-kl")
