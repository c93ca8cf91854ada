"""Where a result comes from: versions, commit, and hashes of the data, the base model and the adapter."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import rankwise
from rankwise import quantized
from rankwise.data.config import DataConfig
from rankwise.data.sources import content_hash, expand
from rankwise.files import sha256_bytes, sha256_file
from rankwise.models.hub import snapshot

GIT_TIMEOUT_S = 10


def data_hashes(config: DataConfig) -> dict[str, dict[str, str]]:
    """SHA-256 of every file, by split (`train`, `valid`) and path. The `test` files are not read in training."""
    splits = {"train": config.train_paths, "valid": config.valid}
    return {
        name: {path: content_hash(path) for path in expand(value)}
        for name, value in splits.items()
        if value is not None
    }


def joined_hash(hashes: dict[str, str]) -> str:
    """One hash for the contents of several files, in their order; their names do not count."""
    return sha256_bytes("".join(hashes.values()).encode())


def model_hashes(model: PreTrainedModel, revision: str | None) -> dict[str, Any]:
    """The base: name, commit where it came from the Hub, hashes and sizes of its config and weight files."""
    name = model.name_or_path or type(model).__name__
    from_hub = None if Path(name).is_dir() else snapshot(name, revision)
    folder = from_hub or Path(name)
    record: dict[str, Any] = {"name": name, "commit": from_hub.name if from_hub else None}
    if folder.is_dir():
        files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
        record["files"] = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in files if file.is_file()
        }
    return record


def adapter_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of an adapter folder, or of a folder of several, by its path in it."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): sha256_file(file) for file in files}


def versions() -> dict[str, str]:
    """Of what computes: Python, torch, transformers, rankwise."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rankwise": rankwise.__version__,
    }


def source_commit() -> str | None:
    """The git commit of rankwise's own source, with `-dirty` where it was changed; None where it is not a checkout."""
    package = Path(rankwise.__file__).parent
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", "--", ".")
    return f"{commit}-dirty" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):  # no git here, or it hangs: then there is no commit to name
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def provenance(
    model: PreTrainedModel,
    revision: str | None,
    data: dict[str, dict[str, str]],
    start: Path | None,
    resumed_from: int | None,
) -> dict[str, Any]:
    """The record of a run at its start. Its end fills `adapter` in.

    Args:
        model: the base.
        revision: that of the base which was asked for.
        data: hashes of the files, as `data_hashes` gives them.
        start: the adapter that the run begins with.
        resumed_from: the step after which it goes on.
    """
    storage = quantized.storage_in(model)
    in_bits = {} if storage is None else {"bitsandbytes": version("bitsandbytes")}
    return {
        "versions": versions() | in_bits,
        "commit": source_commit(),
        "device": str(model.device),
        "data": data,
        "base": model_hashes(model, revision) | ({} if storage is None else {"stored_in": storage}),
        "start": None if start is None else {"folder": str(start), "files": adapter_hashes(start)},
        "resumed_from": resumed_from,
        "adapter": None,
    }
