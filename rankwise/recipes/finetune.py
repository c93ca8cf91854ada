"""One fine-tuning run: what `rankwise train` calls, and a notebook may.

Everything is read and checked before the output folder is made, so that a wrong request leaves nothing behind. Under
torchrun every process goes through all of it, and the first alone writes and speaks.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rankwise import distributed
from rankwise.attach.checkpoint import TASKS_FILE, read_tensors, save_adapter
from rankwise.attach.gate_folder import is_gate_folder, read_gate_folder
from rankwise.attach.inject import adapter_parameters
from rankwise.errors import RankwiseError, RequestError, WorkError, WriteError
from rankwise.models.sharding import is_sharded
from rankwise.recipes.best import check_best, write_adapter
from rankwise.recipes.finetune_hooks import evaluation_hook, logging_hook, moving_hooks, saving_hook
from rankwise.recipes.finetune_job import Job, prepare
from rankwise.recipes.inspect import factors
from rankwise.recipes.moving_ranks import BeforeSteps
from rankwise.recipes.names import FAILED, FINISHED, RUNNING, STOPPED
from rankwise.recipes.output import RunFolder
from rankwise.recipes.provenance import adapter_hashes
from rankwise.recipes.rank_map import draw_map, rank_history, rank_map, vllm_max_lora_rank
from rankwise.recipes.resume import usable_checkpoint
from rankwise.recipes.run import RunConfig, flat_settings, rank_hint, read_run, run_yaml
from rankwise.recipes.task_extend import cost_of_extension
from rankwise.recipes.task_hooks import stage_plans, task_hooks
from rankwise.recipes.task_stages import TaskStages
from rankwise.say import Say, silent, to_stderr
from rankwise.train.batches import InStep
from rankwise.train.interrupt import Interrupted, StopRequest
from rankwise.train.log import Loggers, ProgressBar, peak_memory_bytes
from rankwise.train.loggers import LoggedRun, check_installed
from rankwise.train.loop import Step, fit
from rankwise.train.objectives import minimised
from rankwise.train.state import ADAPTER, Checkpoint, checkpoint_folders, drop_newer


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

    Under torchrun every process calls it and gets the summary; `on_step` is called in each. What torchrun starts again
    after a failure goes on by itself, where this launch has made the output folder.

    Raises: RequestError, before anything is written, for what is wrong with the request; WorkError when training fails;
        Interrupted (a WorkError) after Ctrl-C, with a checkpoint saved.
    """
    config = read_run(run)
    if config.output is None:
        raise RequestError("missing setting 'output': the folder for the adapter and the run's records")
    folder = RunFolder(Path(config.output))
    with distributed.joined(), contextlib.ExitStack() as held:
        quiet = quiet or not distributed.is_first()
        say = silent if quiet else to_stderr
        distributed.from_first(lambda: check_installed(config.train.loggers))
        if (hint := rank_hint(run)) is not None:
            say(hint)
        is_restart = distributed.any_process(distributed.is_restart())  # each machine counts its own
        is_there, checkpoint = distributed.from_first(lambda: _find(folder, resume, is_restart, held, say))
        job = prepare(config, checkpoint, say)
        if not is_there:
            distributed.from_first(lambda: _make(folder, held))
        check_best(job, folder, say)
        try:
            return _carry_out(job, folder, on_step, quiet)
        except RankwiseError as error:
            _note_end(job, folder, error)
            raise


def _find(
    folder: RunFolder, resume: bool, is_restart: bool, held: contextlib.ExitStack, say: Callable[[str], None]
) -> tuple[bool, Checkpoint | None]:
    """Whether the folder is there, which is then locked, and the checkpoint in it to go on from."""
    if not resume and is_restart and folder.is_of(distributed.job_id()):
        say("torchrun has started this job again: going on with what it has written")
        resume = True
    is_there = folder.check(resume)
    if is_there:
        held.enter_context(folder.locked())
        folder.take_over(distributed.job_id())
    return is_there, usable_checkpoint(folder, say) if resume else None


def _make(folder: RunFolder, held: contextlib.ExitStack) -> None:
    folder.create()
    held.enter_context(folder.locked())
    folder.take_over(distributed.job_id())


def _carry_out(job: Job, folder: RunFolder, on_step: Callable[[Step], None] | None, quiet: bool) -> dict[str, Any]:
    """Trains into `folder`, and writes the result."""
    distributed.from_first(lambda: _begin(job, folder))
    train = job.run.train
    go_on = f"rankwise train {shlex.quote(str(folder.run_file))} --resume"
    if distributed.world_size() > 1:
        go_on = f"the same torchrun, and -m {go_on}"
    with (
        StopRequest() as stop,
        ProgressBar(job.plan.num_steps, job.progress.step, shown=not quiet) as bar,
        _loggers(job, folder, bar.say) as loggers,
    ):
        hooks = [
            *moving_hooks(job, bar.say),
            evaluation_hook(job, folder, bar.say),
            *task_hooks(job, folder),
            logging_hook(job, folder, bar, loggers),
            *([on_step] if on_step is not None else []),
            saving_hook(job, folder, stop, go_on),
        ]
        batches = InStep(job.batches) if is_sharded(job.model) else job.batches
        if job.mover is not None:
            batches = BeforeSteps(batches, job.mover)
        try:
            for plan in stage_plans(job, folder, bar.say):
                fit(job.model, job.optimizer, batches, minimised(job.objective, train), plan, job.progress, hooks)
            return _finish(job, folder, bar.say)
        except Interrupted:
            raise
        except distributed.LostProcess as error:
            raise distributed.LostProcess(f"{error}; {_last_saved(folder)}, go on with: {go_on}") from error
        except WriteError as error:
            raise WorkError(f"{error}; {_kept(job, folder)}, go on with: {go_on}") from error
        except WorkError as error:
            raise WorkError(f"{error}; {_way_back(folder)}") from error


def _loggers(job: Job, folder: RunFolder, say: Say) -> Loggers:
    """Those that `train.loggers` names; none on all processes but the first."""
    settings = flat_settings(job.run)
    described = LoggedRun(folder.path.name, folder.loggers, settings, job.progress.step)
    return Loggers(job.run.train.loggers if distributed.is_first() else [], described, say)


def _finish(job: Job, folder: RunFolder, say: Say) -> dict[str, Any]:
    """Writes the result; the summary last, for it says that the run is finished."""
    return distributed.from_first(lambda: _write_result(job, folder, say))


def _write_result(job: Job, folder: RunFolder, say: Say) -> dict[str, Any]:
    adapter_step = write_adapter(job, folder, say)
    folder.write_provenance({**job.provenance, "adapter": adapter_hashes(folder.adapter)})
    summary = _summary(job, folder, adapter_step, _drawn_ranks(job, folder))
    folder.write_status(FINISHED, job.plan.num_steps)
    folder.write_summary(summary)
    return summary


def _drawn_ranks(job: Job, folder: RunFolder) -> Path | None:
    """Draws the rank map where a policy places ranks, or layers have different ones; None where all are one."""
    ranks = saved_ranks(folder.adapter)
    if job.run.ranks.policy == "fixed" and len(set(ranks.values())) == 1:
        return None
    draw_map(rank_map(ranks), rank_history(folder.path), folder.ranks_picture)
    return folder.ranks_picture


def _note_end(job: Job, folder: RunFolder, error: RankwiseError) -> None:
    """Writes down, for `rankwise runs`, that the run did not come to its end."""
    if distributed.is_first():
        status = STOPPED if isinstance(error, Interrupted) else FAILED
        with contextlib.suppress(WriteError):  # the disk may be what failed; the error itself is said anyhow
            folder.write_status(status, job.plan.num_steps, error.message)


def _begin(job: Job, folder: RunFolder) -> None:
    if job.checkpoint is not None:
        drop_newer(folder.path, job.checkpoint.step)
    folder.begin(job.progress.step, run_yaml(job.run))
    folder.write_status(RUNNING, job.plan.num_steps)
    folder.write_provenance(job.provenance)


def _kept(job: Job, folder: RunFolder) -> str:
    """What is left of a run that could not write; without a checkpoint its adapter is saved where there may be room."""
    if checkpoint_folders(folder.path) or not distributed.is_first():
        return _last_saved(folder)
    step = job.progress.step
    if step == job.plan.num_steps and folder.adapter.exists():
        return f"the adapter is whole in '{folder.adapter}'"
    try:
        rescued = Path(tempfile.mkdtemp(prefix="rankwise-")) / ADAPTER
        save_adapter(job.model, rescued)
    except (OSError, WorkError):
        return _last_saved(folder)
    return f"there was no checkpoint yet; the adapter as it was after step {step} is in '{rescued}'"


def _last_saved(folder: RunFolder) -> str:
    saved = checkpoint_folders(folder.path)
    return f"the last checkpoint is '{saved[-1]}'" if saved else "nothing had been saved"


def _way_back(folder: RunFolder) -> str:
    """What is left of a run that failed."""
    saved = checkpoint_folders(folder.path)
    if not saved or (saved[-1] / ADAPTER / TASKS_FILE).is_file():  # a run can't start from several adapters
        return _last_saved(folder)
    return f"{_last_saved(folder)}, a new run can start there with adapter.from={saved[-1] / 'adapter'}"


def _summary(job: Job, folder: RunFolder, adapter_step: int, picture: Path | None) -> dict[str, Any]:
    progress = job.progress
    return {
        "output": str(folder.path),
        "steps": progress.step,
        "final_loss": progress.loss,
        "best_valid_loss": progress.best_valid_loss,
        "adapter_step": adapter_step,
        "stopped_early": progress.step < job.plan.num_steps,
        "tokens_per_s": progress.num_tokens / progress.train_s,
        "peak_memory_bytes": peak_memory_bytes(job.model.device),
        "trainable_parameters": sum(p.numel() for p in adapter_parameters(job.model).values() if p.requires_grad),
        "vllm_max_lora_rank": vllm_max_lora_rank(highest_rank(folder.adapter)),
        "rank_map": None if picture is None else str(picture),
        "resumed_from": job.resumed_from,
        "skipped_rows": sum(part.num_skipped for part in (job.data.train, job.data.valid) if part is not None),
        **({} if job.tasks is None else {"tasks": _tasks_summary(job, job.tasks)}),
    }


def _tasks_summary(job: Job, tasks: TaskStages) -> dict[str, Any]:
    if job.run.tasks.extend is None:
        return tasks.run.summary()
    return {**tasks.run.summary(), "extended": cost_of_extension(job.run, job.model, job.progress.train_s)}


def saved_ranks(adapter: Path) -> dict[str, int]:
    """The rank of every layer of an adapter's folder; of one that holds several the sums over them."""
    found: Counter[str] = Counter()
    for ranks in _ranks_of_each(adapter):
        found.update(ranks)
    return dict(found)


def highest_rank(adapter: Path) -> int:
    """The highest rank of a layer of an adapter's folder, or of any of several adapters."""
    return max(max(ranks.values()) for ranks in _ranks_of_each(adapter))


def _ranks_of_each(adapter: Path) -> list[dict[str, int]]:
    folders = [adapter]
    if is_gate_folder(adapter):
        folders = [adapter / name for name in read_gate_folder(adapter).adapters]
    return [{n: len(A) for n, (A, _) in factors(read_tensors(one), str(one)).items()} for one in folders]
