"""Checkpoints: everything that a run needs to go on as if it had never stopped: on a CPU bit for bit, given the same
versions and number of threads.

    checkpoints/step-50/
        adapter/            PEFT's format, usable as it is
        state.safetensors   adapter/<name>, optimizer/<name>/<state>, rng/<process>/<generator>
        state.json          progress, settings, SHA-256 of every other file, and of itself

A checkpoint appears under its name only when it is whole; one that was damaged later is recognised by its hashes. Of
several processes the first writes it, shares of the optimizer's state and all generators included; any number of
processes can go on from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

from rankwise import distributed
from rankwise.attach.checkpoint import load_native_state, native_state, save_adapter
from rankwise.attach.inject import adapter_parameters
from rankwise.errors import WorkError
from rankwise.files import remove_folder, replacing_folder, sha256_bytes, sha256_file, sweep
from rankwise.train.evaluations import Evaluations
from rankwise.train.loop import Progress
from rankwise.train.optim import load_optimizer_state
from rankwise.train.rng import process_seed, rng_state, seed_everything, set_rng_state
from rankwise.train.scale import LossScale
from rankwise.train.shares import owned, whole_state
from rankwise.train.watch import LossWatch

FORMAT = 2
CHECKPOINTS = "checkpoints"
STATE = "state.safetensors"
RECORD = "state.json"
ADAPTER = "adapter"

_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: where it lies, how far the run had come, and the settings it ran with."""

    folder: Path
    progress: Progress
    settings: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.progress.step


def save_checkpoint(
    run_folder: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    settings: Mapping[str, Any],
    keep: int | None,
) -> Checkpoint:
    """Writes `checkpoints/step-N`, then removes all but the newest `keep` (None: removes none), and the best of each.

    The best of a checkpoint is the one that its evaluations had found best by then, where such a one is kept: if the
    newest are damaged later, the run goes on from an older one and still has it.

    Raises: WorkError when it cannot be written; the older checkpoints then stay.
    """
    folder = checkpoint_folder(run_folder, progress.step)
    tensors = _tensors(model, optimizer)
    distributed.from_first(lambda: _write(folder, model, tensors, progress, settings))
    if keep is not None and distributed.is_first():
        folders = checkpoint_folders(run_folder)
        kept = [*folders[-keep:], *(best for path in folders[-keep:] if (best := _best_of(path)) is not None)]
        for old in folders:
            if old not in kept:
                remove_folder(old)
    return Checkpoint(folder, progress, dict(settings))


def _write(
    folder: Path, model: PreTrainedModel, tensors: dict[str, Tensor], progress: Progress, settings: Mapping[str, Any]
) -> None:
    with replacing_folder(folder) as temporary:
        save_adapter(model, temporary / ADAPTER)
        (temporary / STATE).write_bytes(save(tensors))
        record = {
            "format": FORMAT,
            "progress": asdict(progress),
            "settings": dict(settings),
            "files": {str(path.relative_to(temporary)): sha256_file(path) for path in _files(temporary)},
        }
        record["sha256"] = _digest(record)
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the first process writes (nothing on the others), gathered from all of them: all must call it."""
    generators = distributed.gathered_at_first(rng_state(model.device))
    moments = whole_state(optimizer, adapter_parameters(model))
    if generators is None:
        return {}
    parts = {
        "adapter": native_state(model),
        "optimizer": moments,
        **{f"rng/{process}": state for process, state in enumerate(generators)},
    }
    return {
        f"{part}/{name}": tensor.detach().cpu().contiguous()
        for part, state in parts.items()
        for name, tensor in state.items()
    }


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)


def _digest(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return sha256_bytes(json.dumps(rest, sort_keys=True).encode())


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """Where the run's checkpoint after `step` lies, if there is one."""
    return run_folder / CHECKPOINTS / f"step-{step}"


def _best_of(folder: Path) -> Path | None:
    """The folder of the checkpoint that was the best one when this one was written; None: none was kept."""
    if damage(folder, contents=False) is not None:
        return None
    step = _read(folder).progress.evaluations.best_step
    return None if step is None else folder.with_name(f"step-{step}")


def checkpoint_folders(run_folder: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first, whole or not."""
    root = run_folder / CHECKPOINTS
    named = [(match, path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))] if root.is_dir() else []
    return [path for _, path in sorted((int(match[1]), path) for match, path in named)]


def find_checkpoint(run_folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and one line for each newer one that is damaged. Reads and hashes; changes nothing.

    Raises: WorkError when there are checkpoints and none is whole.
    """
    problems: list[str] = []
    folders = checkpoint_folders(run_folder)
    for folder in reversed(folders):
        problem = damage(folder)
        if problem is None:
            return _read(folder), problems
        problems.append(f"checkpoint '{folder}' is damaged ({problem})")
    if folders:
        raise WorkError(
            f"no checkpoint in '{run_folder / CHECKPOINTS}' is whole: {'; '.join(problems)}; "
            "delete that folder to start afresh"
        )
    return None, []


def damage(folder: Path, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint's files, or None. `contents`: also of those that its record names."""
    path = folder / RECORD
    if not path.is_file():
        return f"{RECORD} is missing"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return f"{RECORD} is cut off or not JSON"
    except OSError as error:
        return f"{RECORD} can't be read: {error.strerror}"
    if not isinstance(record, dict) or record.get("sha256") != _digest(record):
        return f"{RECORD} does not match its own hash"
    if record["format"] != FORMAT:
        return f"format {record['format']}, this version reads {FORMAT}"
    for name, expected in record["files"].items() if contents else ():
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            is_as_written = sha256_file(folder / name) == expected
        except OSError as error:
            return f"{name} can't be read: {error.strerror}"
        if not is_as_written:
            return f"{name} does not match its hash"
    return None


def _read(folder: Path) -> Checkpoint:
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    saved = record["progress"]
    parts = {
        "evaluations": Evaluations(**saved.get("evaluations", {})),  # which earlier versions did not keep
        "watch": LossWatch(**saved["watch"]),
        "scale": LossScale(**saved["scale"]),
    }
    progress = Progress(**{**saved, **parts})
    return Checkpoint(folder, progress, record["settings"])


def drop_newer(run_folder: Path, step: int) -> None:
    """Removes checkpoints after `step` (damaged, or there would be a newer one to go on from) and half-written ones."""
    for folder in checkpoint_folders(run_folder):
        if int(folder.name.removeprefix("step-")) > step:
            remove_folder(folder)
    sweep(run_folder / CHECKPOINTS)


def restore(checkpoint: Checkpoint, model: PreTrainedModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Puts the adapter, the optimizer and the random number generators where the checkpoint left them.

    Where the run had fewer processes, those that are new take generators of their own from `seed`.

    Raises: WorkError when its tensors do not fit the attached model.
    """
    parts: dict[str, dict[str, Tensor]] = {"adapter": {}, "optimizer": {}, "rng": {}}
    for full_name, tensor in load_file(checkpoint.folder / STATE).items():
        part, _, name = full_name.partition("/")
        parts[part][name] = tensor
    load_native_state(model, parts["adapter"])
    parameters = adapter_parameters(model)
    load_optimizer_state(optimizer, parameters, parts["optimizer"], owned(optimizer, parameters).keys())
    prefix = f"{distributed.rank()}/"
    generators = {n.removeprefix(prefix): state for n, state in parts["rng"].items() if n.startswith(prefix)}
    if generators:
        set_rng_state(generators, model.device)
    else:
        seed_everything(process_seed(seed, distributed.rank(), checkpoint.step))
