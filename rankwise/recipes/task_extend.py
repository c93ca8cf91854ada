"""New tasks for task embeddings that are there (`tasks.extend`): each learns a vector, all else stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rankwise.adapters.gate_config import SHARED, check_names
from rankwise.attach.bases import check_bases, weight_hashes
from rankwise.attach.checkpoint import load_adapter
from rankwise.attach.gate_folder import is_gate_folder, read_gate_folder
from rankwise.attach.gates import set_task
from rankwise.attach.inject import adapter_parameters
from rankwise.errors import RequestError
from rankwise.recipes.provenance import model_hashes
from rankwise.recipes.run import RunConfig
from rankwise.recipes.run_tasks import extended_folder
from rankwise.say import Say
from rankwise.tasks.new_task import DEFAULT_LR, add_task

LOW_LR = 0.005
"""Below it entries near 1 hardly move in some dozens of steps."""


def check_extended(run: RunConfig) -> None:
    """Raises: RequestError for a folder that is none of task embeddings, or that has one of the new tasks already."""
    given = run.tasks.extend
    if given is None:
        return
    folder = extended_folder(given)
    if not folder.is_dir():
        raise RequestError(f"tasks.extend: there is no folder '{folder}'")
    if not is_gate_folder(folder):
        raise RequestError(
            f"tasks.extend: '{folder}' holds no task embeddings; give a run that trained some (tasks.embedding), or "
            "its adapter"
        )
    spec = read_gate_folder(folder)
    if spec.embedding is None:
        raise RequestError(
            f"tasks.extend: '{folder}' is a gate, whose tasks have an adapter each, not a vector on a shared one; "
            "train the new task's adapter, and put all of them together by tasks.adapters"
        )
    again = next((name for name in run.tasks.names if name in spec.tasks), None)
    if again is not None:
        raise RequestError(
            f"tasks.data: '{folder}' has a task '{again}' already ({', '.join(spec.tasks)}); choose another name"
        )
    check_names([*spec.tasks, *run.tasks.names])


def attach_extended(model: PreTrainedModel, run: RunConfig, say: Say) -> None:
    """Attaches what is extended, with a vector for each new task: the mean of those that are there.

    Raises: RequestError for a folder that does not fit the model, or is of another base.
    """
    assert run.tasks.extend is not None
    folder = extended_folder(run.tasks.extend)
    check_bases({SHARED: folder / SHARED}, lambda: weight_hashes(model_hashes(model, run.model.revision)), say)
    load_adapter(model, folder)
    for name in run.tasks.names:
        add_task(model, name)
    set_task(model, run.tasks.names[0])  # until the first batch says its own
    if run.train.lr < LOW_LR:
        say(
            f"hint: train.lr {run.train.lr:g} is low for vectors, whose entries are near 1: rates around "
            f"{DEFAULT_LR:g} are usual"
        )


def cost_of_extension(run: RunConfig, model: PreTrainedModel, train_s: float) -> dict[str, Any]:
    """What learning the new tasks took: numbers that were trained, their share of the adapter, and seconds."""
    assert run.tasks.extend is not None
    every = adapter_parameters(model).values()
    trained = sum(parameter.numel() for parameter in every if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in every)
    return {
        "from": str(Path(run.tasks.extend)), "tasks": list(run.tasks.names), "parameters": trained,
        "share_of_adapter": trained / whole, "train_s": train_s,
    }  # fmt: skip
