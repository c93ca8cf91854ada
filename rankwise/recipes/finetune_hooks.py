"""What happens between the steps of a fine-tuning run: evaluation with samples, logging, saving, stopping."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import islice

from rankwise import distributed
from rankwise.data.example import Example
from rankwise.errors import WorkError, counted
from rankwise.evaluate.generate import generate_answers
from rankwise.evaluate.perplexity import Likelihood, LossError, measure_loss, together
from rankwise.recipes.finetune_job import Job
from rankwise.recipes.output import RunFolder
from rankwise.say import Say
from rankwise.train.config import Every
from rankwise.train.interrupt import Interrupted, StopRequest
from rankwise.train.log import Loggers, ProgressBar, peak_memory_bytes
from rankwise.train.loop import Hook, Step
from rankwise.train.objective import means
from rankwise.train.rng import untouched
from rankwise.train.state import save_checkpoint


class _Period:
    """When something happens: at each multiple of a period, and at the end, unless the setting says never."""

    def __init__(self, job: Job, setting: str) -> None:
        train = job.run.train
        self._every = Every.parse(getattr(train, setting), f"train.{setting}", job.plan.num_steps)
        self._batch_size, self._num_rows = train.batch_size, job.data.rows_per_epoch

    def due(self, step: Step) -> bool:
        """Whether it happens after this step."""
        if self._every.is_never:
            return False
        return step.is_last or self._every.due(step.number, self._batch_size, self._num_rows)


def moving_hooks(job: Job, say: Say) -> list[Hook]:
    """What moves the ranks after a step, before anything else looks at the model; nothing where they stay."""
    mover = job.mover
    if mover is None:
        return []
    return [lambda step: mover.after(step, job.progress, say)]


def evaluation_hook(job: Job, folder: RunFolder, say: Say) -> Hook:
    """Measures the loss on `data.valid` (as `valid_loss`), and generates samples. Training does not notice.

    The hook raises: WorkError when that loss is not finite, for then the step has broken the adapter.
    """
    period = _Period(job, "evaluate_every")
    model, data, train, progress = job.model, job.data, job.run.train, job.progress

    def evaluate(step: Step) -> None:
        if data.valid is None or not period.due(step):
            return
        with untouched(model, model.device):
            try:
                found, of_parts = _measured(job)
            except LossError as error:
                raise WorkError(
                    f"step {step.number}: the validation loss is {error.loss}; lower train.lr ({train.lr:g}, "
                    f"{step.lr:g} at this step), or try train.precision=fp32 if it was bf16 or fp16"
                ) from error
            step.metrics["valid_loss"] = found.loss
            step.metrics |= {f"valid_{name}": value for name, value in found.figures.items()}
            step.metrics |= {f"valid_loss/{name}": loss for name, loss in of_parts.items()}
            if progress.best_valid_loss is None or found.loss < progress.best_valid_loss:
                progress.best_valid_loss = found.loss
            say(f"step {step.number}: validation loss {found.loss:.4f} (best {progress.best_valid_loss:.4f})")
            evaluations = progress.evaluations
            evaluations.take(step.number, found.loss, train.min_delta, train.keep_best)
            if evaluations.are_stale(job.plan.patience) and not step.is_last:
                step.stops_early = True
                say(
                    f"step {step.number}: {counted(evaluations.num_stale, 'evaluation')} in turn without a validation "
                    f"loss below {evaluations.reference:.4f}"
                    + (f" by {train.min_delta:g}" if train.min_delta else "")
                    + ": stopping early"
                )
            _generate_samples(job, folder, step.number)

    return evaluate


def _measured(job: Job) -> tuple[Likelihood, dict[str, float]]:
    """The loss on all validation rows, and that of each source or file where there are several."""
    data = job.data
    assert data.valid is not None

    def measure(examples: Sequence[Example]) -> Likelihood:
        return measure_loss(
            job.model, job.objective, examples, data.pad_id, job.run.train.micro_rows, job.batches.packing
        )  # fmt: skip

    parts = data.valid_parts
    if not parts or job.objective.step_losses is not None:  # there a row's loss depends on all others
        return measure(data.valid.examples), {}
    found = {name: measure(examples) for name, examples in parts.items()}
    return together(list(found.values())), {name: one.loss for name, one in found.items()}


def _generate_samples(job: Job, folder: RunFolder, step: int) -> None:
    data, train = job.data, job.run.train
    assert data.valid is not None
    # rows of plain text ask nothing
    parts = data.valid_parts if job.tasks is not None else {"": data.valid.examples}
    for number, (name, examples) in enumerate(parts.items()):
        share = train.num_samples // len(parts) + (number < train.num_samples % len(parts))  # spread over tasks
        asked = list(islice((example for example in examples if example.prompt_ids), share))
        if not asked:
            continue
        with job.tasks.on(name) if job.tasks is not None else contextlib.nullcontext():
            answers = generate_answers(
                job.model, data.tokenizer, [example.prompt_ids for example in asked], train.longest_sample_tokens,
                batch_size=train.micro_rows, stop_ids=data.stop_ids,
            )  # fmt: skip
        of_task = {"task": name} if job.tasks is not None else {}
        for example, answer in zip(asked, answers, strict=True) if distributed.is_first() else ():
            said = {"prompt": example.prompt_text, "answer": answer, "reference": example.answer}
            folder.samples.append({"step": step, **of_task, **said})


def logging_hook(job: Job, folder: RunFolder, bar: ProgressBar, loggers: Loggers) -> Hook:
    """Moves the bar at each step; writes a line of metrics when one is due, after an evaluation, and at the end.

    `loss` and `tokens_per_s` are means since the line before, by tokens; `lr` and `grad_norm` are of the step itself.
    """
    period = _Period(job, "log_every")
    progress, device = job.progress, job.model.device

    def log(step: Step) -> None:
        memory_bytes = peak_memory_bytes(device)
        bar.update(step.number, step.loss, progress.num_tokens / progress.train_s, memory_bytes)
        if step.is_skipped:
            scale = progress.scale
            bar.say(
                f"step {step.number}: the gradients overflowed fp16, the step was skipped "
                f"({counted(scale.skipped_steps, 'step')} so far); the loss scale is now {scale.factor:g}"
            )
        if not (period.due(step) or step.is_last or step.metrics):
            return
        progress.loss = progress.interval_loss / progress.interval_trained
        line = {
            "step": step.number,
            **({} if job.tasks is None else {"stage": job.tasks.run.stage_name(step.number)}),
            "loss": progress.loss,
            "lr": step.lr,
            "grad_norm": None if step.is_skipped else step.grad_norm,
            "tokens_per_s": progress.interval_tokens / progress.interval_s,
            "peak_memory_bytes": memory_bytes,
            **means(progress.interval_figures),
            **progress.scale.figures(),
            **step.metrics,
            **({"statistics": step.statistics} if step.statistics else {}),
        }
        if distributed.is_first():
            folder.metrics.append(line)
            loggers.log(line)
        progress.interval_loss, progress.interval_s = 0.0, 0.0
        progress.interval_trained = progress.interval_tokens = 0
        progress.interval_figures = {}

    return log


def saving_hook(job: Job, folder: RunFolder, stop: StopRequest, go_on: str) -> Hook:
    """Saves a checkpoint when one is due, when `train.keep_best` wants it, and when the run was asked to stop.

    `go_on` is the command that resumes the run.
    """
    period = _Period(job, "save_every")
    keep = job.run.train.num_checkpoints

    def save(step: Step) -> None:
        # read once: a request that comes while saving waits for the next step's end; all processes stop at one step
        is_over = step.stops_early or step.number == job.plan.num_steps  # a stage's last step is none of the run's
        stopping = distributed.any_process(stop.asked) and not is_over
        is_best = job.run.train.keep_best and job.progress.evaluations.best_step == step.number
        if stopping or is_best or period.due(step):
            save_checkpoint(folder.path, job.model, job.optimizer, job.progress, job.settings, keep)
        if stopping:
            raise Interrupted(f"stopped after step {step.number} of {job.plan.num_steps}, saved; go on with: {go_on}")

    return save
