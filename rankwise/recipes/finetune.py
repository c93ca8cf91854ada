"""One fine-tuning run: what `rankwise train` calls, and a notebook may.

Everything is read and checked before the output folder is made, so that a wrong request leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rankwise import distributed
from rankwise.attach.checkpoint import save_adapter
from rankwise.attach.inject import adapter_parameters
from rankwise.errors import RequestError, WorkError, WriteError
from rankwise.recipes.finetune_hooks import evaluation_hook, logging_hook, saving_hook
from rankwise.recipes.finetune_job import Job, prepare
from rankwise.recipes.output import RunFolder
from rankwise.recipes.provenance import adapter_hashes
from rankwise.recipes.resume import usable_checkpoint
from rankwise.recipes.run import RunConfig, read_run, run_yaml
from rankwise.train.interrupt import Interrupted, StopRequest
from rankwise.train.log import ProgressBar, peak_memory_bytes
from rankwise.train.loop import Step, fit
from rankwise.train.objectives import minimised
from rankwise.train.state import checkpoint_folders


def train(
    run: RunConfig | Mapping[str, Any] | str | os.PathLike[str],
    on_step: Callable[[Step], None] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains an adapter and returns the run's summary, which is also in its summary.json.

    Args:
        run: a run file, a mapping of the same shape, or a RunConfig.
        on_step: called with each finished `Step` (number, loss, lr, ...), after logging and before saving.
        resume: go on from the output folder's last whole checkpoint; with none, start afresh and say so.
        quiet: print nothing on stderr.

    Raises: RequestError, before anything is written, for what is wrong with the request; WorkError when training fails;
        Interrupted (a WorkError) after Ctrl-C, with a checkpoint saved.
    """
    config = read_run(run)
    if config.output is None:
        raise RequestError("missing setting 'output': the folder for the adapter and the run's records")
    if (processes := distributed.launched_processes()) > 1:
        raise RequestError(f"training on {processes} processes is not available yet; start one, without torchrun")
    folder = RunFolder(Path(config.output))
    is_there = folder.check(resume)
    say = _silent if quiet else _say
    with contextlib.ExitStack() as held:
        if is_there:
            held.enter_context(folder.locked())
        checkpoint = usable_checkpoint(folder, say) if resume else None
        job = prepare(config, checkpoint, say)
        if not is_there:
            folder.create()
            held.enter_context(folder.locked())
        return _carry_out(job, folder, on_step, quiet)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    """Takes a line and prints nothing."""


def _carry_out(job: Job, folder: RunFolder, on_step: Callable[[Step], None] | None, quiet: bool) -> dict[str, Any]:
    """Trains into `folder`, and writes the result."""
    folder.begin(job.progress.step, run_yaml(job.run))
    folder.write_provenance(job.provenance)
    train = job.run.train
    go_on = f"rankwise train {shlex.quote(str(folder.run_file))} --resume"
    with StopRequest() as stop, ProgressBar(job.plan.num_steps, job.progress.step, shown=not quiet) as bar:
        hooks = [
            evaluation_hook(job, folder, bar.say),
            logging_hook(job, folder, bar),
            *([on_step] if on_step is not None else []),
            saving_hook(job, folder, stop, go_on),
        ]
        try:
            fit(job.model, job.optimizer, job.batches, minimised(job.objective, train), job.plan, job.progress, hooks)
            return _finish(job, folder)
        except Interrupted:
            raise
        except WriteError as error:
            raise WorkError(f"{error}; {_last_saved(folder)}, go on with: {go_on}") from error
        except WorkError as error:
            raise WorkError(f"{error}; {_way_back(folder)}") from error


def _finish(job: Job, folder: RunFolder) -> dict[str, Any]:
    """Writes the result; the summary last, for it says that the run is finished."""
    save_adapter(job.model, folder.adapter)
    folder.write_provenance({**job.provenance, "adapter": adapter_hashes(folder.adapter)})
    summary = _summary(job, folder)
    folder.write_summary(summary)
    return summary


def _last_saved(folder: RunFolder) -> str:
    saved = checkpoint_folders(folder.path)
    return f"the last checkpoint is '{saved[-1]}'" if saved else "nothing had been saved"


def _way_back(folder: RunFolder) -> str:
    """What is left of a run that failed."""
    saved = checkpoint_folders(folder.path)
    if not saved:
        return _last_saved(folder)
    return f"{_last_saved(folder)}, a new run can start there with adapter.from={saved[-1] / 'adapter'}"


def _summary(job: Job, folder: RunFolder) -> dict[str, Any]:
    progress = job.progress
    return {
        "output": str(folder.path),
        "steps": progress.step,
        "final_loss": progress.loss,
        "best_valid_loss": progress.best_valid_loss,
        "tokens_per_s": progress.num_tokens / progress.train_s,
        "peak_memory_bytes": peak_memory_bytes(job.model.device),
        "trainable_parameters": sum(parameter.numel() for parameter in adapter_parameters(job.model).values()),
        "resumed_from": job.resumed_from,
        "skipped_rows": sum(part.num_skipped for part in (job.data.train, job.data.valid) if part is not None),
    }
