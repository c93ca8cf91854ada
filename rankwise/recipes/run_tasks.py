"""The `tasks:` section of a run file beside the others: its files become the run's sources; what does not go with it.

The sources of training rows are the tasks, in their order, each under its task's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.adapters.config import LoraConfig
from rankwise.adapters.gate_config import SHARED as SHARED_ADAPTER
from rankwise.adapters.gate_config import check_names
from rankwise.config import build, to_dict
from rankwise.errors import RequestError
from rankwise.ranks.config import MOVING
from rankwise.tasks.config import BEHIND, SHARED, TaskFiles, TasksConfig, said_of

if TYPE_CHECKING:
    from rankwise.recipes.run import RunConfig

FROM_TASKS = ("train", "valid")
"""Settings of `data` that the tasks' files say."""
WITHOUT_TASKS = ("dpo", "embedding")
"""Objectives whose rows are compared with each other, or read by two models."""


def with_task_files(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with `data.train` and `data.valid` as `tasks.data` says, where it says so.

    Raises: RequestError where both say it.
    """
    result = dict(document)
    tasks = (document.get("tasks") or {}).get("data")
    if not tasks:
        return result
    if not isinstance(tasks, Mapping):
        raise RequestError(f"tasks.data must be a mapping of tasks to their files, not {tasks!r}")
    data = dict(document.get("data") or {})
    for name in FROM_TASKS:
        if data.get(name) is not None:
            raise RequestError(f"data.{name} and tasks.data both say which files there are; leave data.{name} out")
    with said_of("data"):
        check_names(tasks)
    files: dict[str, TaskFiles] = {}
    for name, values in tasks.items():
        with said_of(f"data.{name}"):
            files[name] = build(TaskFiles, values, f"tasks.data.{name}")
    data["train"] = [{"path": one.train, "name": name} for name, one in files.items()]
    data["valid"] = [path for one in files.values() for path in _listed(one.valid)] or None
    result["data"] = data
    return result


def without_task_files(run: RunConfig) -> dict[str, Any]:
    """The `data` section as a run file has it, where `tasks.data` says which files there are."""
    return {name: value for name, value in to_dict(run.data).items() if name not in FROM_TASKS}


def absolute_task_paths(tasks: Mapping[str, Any], absolute: Callable[[Any], Any]) -> dict[str, Any]:
    """The section with the paths in it made absolute by `absolute`."""
    result = dict(tasks)
    if isinstance(data := tasks.get("data"), Mapping):
        result["data"] = {
            name: {key: absolute(value) for key, value in files.items()} if isinstance(files, Mapping) else files
            for name, files in data.items()
        }
    if "extend" in tasks:
        result["extend"] = absolute(tasks["extend"])
    if isinstance(adapters := tasks.get("adapters"), Mapping):
        result["adapters"] = {name: absolute(folder) for name, folder in adapters.items()}
    return result


def adapter_of_tasks(document: Mapping[str, Any], adapters: Mapping[str, str]) -> LoraConfig:
    """The settings of the adapters that the tasks begin with, which are those of the first of them.

    Raises: RequestError where the section `adapter` says something too, or the folder can't be read.
    """
    section = document.get("adapter") or {}
    if section:
        raise RequestError(
            f"adapter.{next(iter(section))} has no effect with tasks.adapters, whose own settings hold; leave it out"
        )
    from rankwise.attach.checkpoint import read_config  # which needs torch

    name, folder = next(iter(adapters.items()))
    try:
        config = read_config(folder)
    except RequestError as error:
        raise RequestError(f"tasks.adapters.{name}: {error}") from None
    return config.with_(
        init_lora_weights=True, init_scale=1.0, base_model_name_or_path=None, revision=None, task_type=None
    )


def extended_folder(given: str) -> Path:
    """The folder of task embeddings that `tasks.extend` means: of a run its result."""
    result = Path(given) / "adapter"
    return result if (result / "tasks.json").is_file() else Path(given)


def shared_of_extended(document: Mapping[str, Any], given: str) -> str:
    """The folder of the adapter that the tasks of `tasks.extend` share. Nothing is read of it here.

    Raises: RequestError where the section `adapter` says something too.
    """
    section = document.get("adapter") or {}
    if section:
        raise RequestError(
            f"adapter.{next(iter(section))} has no effect with tasks.extend, whose own adapter is used; leave it out"
        )
    return str(extended_folder(given) / SHARED_ADAPTER)


def valid_files(tasks: TasksConfig) -> dict[str, list[str]]:
    """The validation files of each task; empty where rows are held out."""
    return {name: paths for name, files in tasks.files.items() if (paths := _listed(files.valid))}


def _listed(paths: str | list[str] | None) -> list[str]:
    return [] if paths is None else [paths] if isinstance(paths, str) else list(paths)


def check_tasks(run: RunConfig) -> None:
    """Raises: RequestError where the section `tasks` does not go with another one."""
    tasks, train = run.tasks, run.train
    if [source.name for source in run.data.sources] != list(tasks.names):
        raise RequestError(
            "data.train and tasks.data say different things; give the run as a file or a mapping with tasks.data and "
            "without data.train"
        )
    if run.data.mixing_temperature is not None:
        raise RequestError(
            f"data.mixing_temperature ({run.data.mixing_temperature}) has no effect with tasks; use tasks.sampling"
        )
    if train.objective in WITHOUT_TASKS:
        raise RequestError(
            f"tasks don't go with train.objective: {train.objective}, whose loss is not of single rows; use another"
        )
    if run.ranks.policy in MOVING:
        raise RequestError(f"ranks.policy: {run.ranks.policy} moves ranks, which tasks leave as they are; use fixed")
    _check_stages(run)
    if tasks.drawn.by == BEHIND and train.evaluates_never:
        raise RequestError(
            "tasks.sampling.by: behind reads validation losses, and train.evaluate_every says never; set it to auto"
        )


def several_adapters(tasks: TasksConfig) -> bool:
    """Whether the run's stages need other adapters than a plain one that stays."""
    if not tasks.data:
        return False
    if tasks.extend is not None:
        return True
    return tasks.gate is not None or tasks.embedding is not None or [stage.kind for stage in tasks.plan] != [SHARED]


def _check_stages(run: RunConfig) -> None:
    tasks, train = run.tasks, run.train
    if len(tasks.plan) > 1:
        for name, value in train.needs_evaluation.items():
            raise RequestError(
                f"train.{name} ({value}) does not go with several stages, whose losses don't compare; leave it out, or "
                "train each stage as a run of its own"
            )
    if not several_adapters(tasks):
        return
    if tasks.extend is not None and train.loraplus_ratio != 1.0:
        raise RequestError(
            f"train.loraplus_ratio ({train.loraplus_ratio:g}) has no effect with tasks.extend, which trains vectors "
            "alone; leave it out"
        )
    if train.sharding != "none":
        raise RequestError(
            f"train.sharding: {train.sharding} does not go with tasks.gate, tasks.embedding, tasks.extend or several "
            "stages, which put adapters in place of others; set it to none"
        )
    if train.fused_mlp is True:
        raise RequestError(
            "train.fused_mlp (true) does not go with tasks.gate, tasks.embedding, tasks.extend or several stages; "
            "leave it out"
        )
    from rankwise.recipes.run import StartFrom

    if tasks.extend is not None:
        return
    if isinstance(run.adapter, StartFrom):
        raise RequestError(
            "adapter.from does not go with tasks.gate, tasks.embedding or several stages; give the tasks' own in "
            "tasks.adapters"
        )
    if run.adapter.use_dora:
        raise RequestError(
            "adapter.use_dora does not go with tasks.gate, tasks.embedding or several stages: magnitudes of several "
            "adapters don't add up; use LoRA"
        )
