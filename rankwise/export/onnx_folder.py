"""What `rankwise export --to onnx` writes, and what is known about it: the manifest `rankwise_onnx.json`.

model.onnx             the graph; `model.onnx.data` beside it holds the large weights (encoder-decoder models have
                       encoder.onnx and decoder.onnx)
adapters/N.onnx_adapter  ONNX Runtime's adapter format: tensors for the graph's adapter inputs
rankwise_onnx.json     this module's Manifest: hashes, adapters, how prompts are rendered
config.json, generation_config.json, the tokenizer's files: as in a Hugging Face folder
export_report.json     what was compared with torch

The manifest says which base an adapter belongs to (`base_sha256`, over its weights) and holds size and SHA-256 of
every file of the graph. Nothing here imports torch or onnxruntime.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rankwise.errors import RequestError, did_you_mean
from rankwise.files import sha256_file, write_json

MANIFEST_FILE = "rankwise_onnx.json"
GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
ENCODER_FILE, DECODER_FILE = "encoder.onnx", "decoder.onnx"
GRAPH_FILES = {"seq2seq-lm": (ENCODER_FILE, DECODER_FILE)}
"""For tasks that take more than the one graph GRAPH_FILE."""
DATA_SUFFIX = ".data"
"""Large weights lie beside a graph under its name with this behind it."""
ADAPTERS_FOLDER = "adapters"
ADAPTER_SUFFIX = ".onnx_adapter"
FORMAT = 1
INSTALL = "pip install 'rankwise[onnx]'"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
BASE = "base"
"""What stands for no adapter where one is named."""


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter of the folder: its file, and the smallest and largest rank of its layers."""

    file: str
    sha256: str
    least_rank: int
    most_rank: int


@dataclass(frozen=True)
class Manifest:
    """The content of `rankwise_onnx.json`.

    Args:
        task: a key of `rankwise.models.load.TASKS`.
        base: the base model's name.
        base_sha256: of the base's weights as they were exported, before any quantisation.
        precision: `fp32`, `int8`, `int8-full` or `int4`.
        is_merged: whether the one adapter is folded in; then no adapter can be switched.
        files: the graph's files: size in bytes, and SHA-256.
        adapters: by name.
        chat_template, layout: how a prompt is rendered (`DataConfig.chat_template`, `NEEDS[...].layout`).
        pooling: of an embedding model.
        labels: of a classifier, in the order of its logits.
        max_positions: the longest row; None where the model names no bound.
        start_id, first_id: the token that a decoder of its own starts from, and one that it has to write first.
    """

    task: str
    base: str
    base_sha256: str
    precision: str
    is_merged: bool
    files: dict[str, dict[str, Any]]
    adapters: dict[str, AdapterEntry] = field(default_factory=dict)
    chat_template: str = "auto"
    layout: str = "whole"
    pooling: str | None = None
    labels: list[str] | None = None
    max_positions: int | None = None
    start_id: int | None = None
    first_id: int | None = None
    format: int = FORMAT

    @property
    def graphs(self) -> tuple[str, ...]:
        """The files of its graphs."""
        return GRAPH_FILES.get(self.task, (GRAPH_FILE,))

    @property
    def version(self) -> int:
        """The base's hash as the 31 bits that ONNX Runtime's adapter format has room for (`model_version`)."""
        return int(self.base_sha256[:8], 16) & 0x7FFFFFFF

    def choose(self, adapter: str | None) -> str | None:
        """The adapter meant: the only one where none is named, `base` for none at all.

        Raises: RequestError for a name that is not there, or when there are several and none is named.
        """
        if adapter == BASE:
            if self.is_merged:
                raise RequestError("the adapter of this export is merged into its graph: there is no base alone")
            return None
        if adapter is None:
            if len(self.adapters) > 1:
                raise RequestError(
                    f"this export has several adapters ({', '.join(self.adapters)}); choose one with --adapter, or "
                    f"'{BASE}' for none"
                )
            return next(iter(self.adapters), None)
        if self.is_merged:
            raise RequestError(f"--adapter {adapter} has no effect: this export's adapter is merged into its graph")
        if adapter not in self.adapters:
            raise RequestError(f"there is no adapter '{adapter}'{did_you_mean(adapter, [*self.adapters, BASE])}")
        return adapter


def is_onnx_folder(folder: str | Path) -> bool:
    """Whether `rankwise export --to onnx` has written it."""
    return (Path(folder).expanduser() / MANIFEST_FILE).is_file()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `rankwise_onnx.json`."""
    write_json(folder / MANIFEST_FILE, asdict(manifest))


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of an export.

    Raises: RequestError when there is none, it can't be read, or a later version wrote it.
    """
    path = Path(folder).expanduser() / MANIFEST_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise RequestError(f"'{path}' has format {fields['format']}, this version reads {FORMAT}; export it again")
        adapters = {name: AdapterEntry(**entry) for name, entry in fields.pop("adapters").items()}
        return Manifest(**fields, adapters=adapters)
    except FileNotFoundError:
        raise RequestError(f"'{folder}' is no ONNX export: it has no {MANIFEST_FILE}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"'{path}' can't be read: {error}; export it again") from None


def check_files(folder: Path, manifest: Manifest, whole: bool = False) -> None:
    """The folder's graph files are those that were written.

    `whole` reads the large weights too, which takes a second for each gigabyte or so.

    Raises: RequestError naming the first file that is missing or another one.
    """
    for name, stated in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise RequestError(f"'{path}' is missing; copy the whole folder, or export again")
        if path.stat().st_size != stated["bytes"]:
            raise RequestError(
                f"'{path}' has {path.stat().st_size} bytes, {stated['bytes']} were written; copy it again"
            )
        if (whole or not name.endswith(DATA_SUFFIX)) and sha256_file(path) != stated["sha256"]:
            raise RequestError(f"'{path}' is not the file that was written (its SHA-256 differs); copy it again")


def describe_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """The entry `files` of a manifest."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names}


def need_packages(names: tuple[str, ...] = PACKAGES) -> None:
    """Raises: RequestError with the command that installs them, when a package is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(f"ONNX needs {' and '.join(missing)}, not installed here; run `{INSTALL}`")
