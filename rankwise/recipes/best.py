"""The best checkpoint of a run with `train.keep_best`: going on with it, and its adapter as the run's result."""

from __future__ import annotations

import shutil

from rankwise import distributed
from rankwise.attach.checkpoint import save_adapter
from rankwise.attach.gate_folder import is_gate_folder
from rankwise.errors import WorkError
from rankwise.files import copy_into, replacing_folder
from rankwise.recipes.finetune_job import Job
from rankwise.recipes.output import RunFolder
from rankwise.say import Say
from rankwise.train.state import ADAPTER, checkpoint_folder, damage


def check_best(job: Job, folder: RunFolder, say: Say) -> None:
    """Makes sure that a run which goes on has its best checkpoint; if not, it says so, and the best is sought anew."""
    evaluations = job.progress.evaluations
    if not job.run.train.keep_best:
        evaluations.forget_best()
    if evaluations.best_step is None:
        return
    path = checkpoint_folder(folder.path, evaluations.best_step)
    problem = distributed.from_first(lambda: damage(path))
    if problem is not None:
        say(f"the best checkpoint '{path}' is damaged ({problem}): the best from here on is kept")
        evaluations.forget_best()


def write_adapter(job: Job, folder: RunFolder, say: Say) -> int:
    """Writes `adapter/`: of the best checkpoint where `train.keep_best` asks for it, else as the model is.

    Returns the step that it is of. The last state is in the last checkpoint either way.

    Raises: WorkError when the best checkpoint is damaged, or the adapter can't be written.
    """
    step, best_step = job.progress.step, job.progress.evaluations.best_step
    if job.run.train.keep_best and best_step is None:
        say(f"nothing was evaluated since train.keep_best was set: adapter/ is that of the last step, {step}")
    if best_step in (None, step):
        save_adapter(job.model, folder.adapter)
        return step
    path = checkpoint_folder(folder.path, best_step)
    if (problem := damage(path)) is not None:
        raise WorkError(
            f"the best checkpoint '{path}' is damaged ({problem}); to take the last step's adapter instead, go on with "
            "--resume train.keep_best=false"
        )
    if is_gate_folder(path / ADAPTER):  # a folder of folders
        with replacing_folder(folder.adapter) as new:
            shutil.copytree(path / ADAPTER, new, dirs_exist_ok=True)
    else:
        copy_into(path / ADAPTER, folder.adapter)
    return best_step
