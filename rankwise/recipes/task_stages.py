"""The stages of a run on several tasks, put into practice: which adapters the model holds, what of it is trained, and
which way each row takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.adapters.gate_config import INFERRED, LEARNED, EmbeddingConfig, GateConfig
from rankwise.attach.attachment import attachment_of
from rankwise.attach.checkpoint import load_native_state, native_state
from rankwise.attach.gates import Part, mixture_of, on_task, parts_of, set_task, train_parts
from rankwise.attach.inject import adapter_parameters
from rankwise.attach.targets import fits
from rankwise.errors import RequestError, counted, did_you_mean
from rankwise.recipes.task_layers import APART, PLAIN, Beginning, Layout, arrange
from rankwise.recipes.task_run import TaskRun
from rankwise.say import Say
from rankwise.tasks.config import ADAPTERS, AUTO, GATE, JOINT, SHARED, SINGLE, TasksConfig
from rankwise.tasks.conflict import Conflict, isolated
from rankwise.tasks.router import fit_router
from rankwise.tasks.schedule import Stage

SHOWN_LAYERS = 6


class TaskStages:
    """Makes a model what each stage of its run needs.

    Args:
        run: where the run stands.
        model: with a plain adapter attached, as the section `adapter` says.
        given: the adapter that each task begins with; None: a copy of the attached one.
    """

    def __init__(self, run: TaskRun, model: PreTrainedModel, given: Mapping[str, Part] | None = None) -> None:
        self.run, self.model, self._given = run, model, given
        self._config: TasksConfig = run.config
        self._extends = self._config.extend is not None
        self.layout = Layout(frozenset(), mixture_of(model).embedding) if self._extends else PLAIN
        """Of the model as it is now."""
        self._first = mixture_of(model).number(run.names[0]) if self._extends else 0
        """The number that the model has for the run's first task: others may be there before it."""
        needs_more = not self._extends and (len(run.stages) > 1 or self._layout_of(run.stages[0]).settings is not None)
        self.beginning = Beginning.of(model) if needs_more else None
        self.prompts: Mapping[str, Callable[[], list[Sequence[int]]]] | None = None
        """For a classifier of tasks: what is read of some rows of each before an answer."""
        self.pad_id = 0
        self.measure: Callable[[int], Conflict] | None = None
        """Measures the conflict of the tasks after a step; None: it is never asked for."""
        if isinstance(self._config.isolate, list):
            run.isolated = self._named(self._config.isolate)

    def _named(self, patterns: list[str]) -> list[str]:
        """The adapted layers that are named. Raises: RequestError for a name that fits none."""
        assert self.beginning is not None
        names = list(self.beginning.ranks)
        for pattern in patterns:
            if not any(fits([pattern], name) for name in names):
                last = [name.rpartition(".")[2] for name in names]
                raise RequestError(
                    f"tasks.isolate: no adapted layer is called '{pattern}'{did_you_mean(pattern, [*last, *names])}"
                )
        return [name for name in names if fits(patterns, name)]

    # --- the model ---

    def _layout_of(self, stage: Stage) -> Layout:
        if self._extends:
            return self.layout
        gating = self._config.gating
        if stage.kind == SINGLE:
            return APART if gating is None else Layout(None, gating)
        if stage.kind == JOINT:
            chosen = self.run.isolated
            assert gating is not None
            return PLAIN if chosen == [] else Layout(None if chosen is None else frozenset(chosen), gating)
        return Layout(frozenset(), self._config.embedded)

    def rehearse(self, forward: Callable[[], None]) -> None:
        """Goes through the stages' adapters and calls `forward` with each: what can't be shows before anything is made.

        The model is as before then.
        """
        if self.beginning is None:
            return
        saved = {name: tensor.detach().clone() for name, tensor in native_state(self.model).items()}
        given = self._given
        for stage in self.run.stages:
            self._arrange(self._layout_of(stage))
            self.run.stage = stage
            self._train(stage)
            forward()
        self.run.stage = None
        set_way(self.model, None)
        self._arrange(PLAIN)
        load_native_state(self.model, saved)
        self._given = given

    def resume(self) -> None:
        """Gives the model the adapters that it had in the stage of a checkpoint, before its tensors are loaded."""
        if self.run.stage is not None:
            before = self.run.stages[: self.run.stage.index + 1]
            if any(stage.kind == SHARED for stage in before):
                self._given = None  # what came after it has the ranks of the section `adapter`
            self._arrange(self._layout_of(self.run.stage))
            self._train(self.run.stage)

    def enter(self, stage: Stage, say: Say, note: Callable[[Conflict], None]) -> None:
        """Makes the model what `stage` needs, whose first step comes next. `note` takes a measurement that it took."""
        if stage.kind == JOINT and self._config.isolate == AUTO and self.run.isolated is None:
            self._isolate(stage, say, note)
        layout = self._layout_of(stage)
        gating = self._config.gating
        mixes = stage.kind == JOINT and gating is not None and gating.mode in LEARNED
        error = self._arrange(layout, torch.Generator().manual_seed(self.run.seed) if mixes else None)
        self._train(stage)
        self.run.begin(stage)
        size = sum(one.numel() for one in adapter_parameters(self.model).values() if one.requires_grad)
        lost = f"; what became shared differs by {error:.1%} from the mean of the tasks' changes" if error else ""
        say(
            f"stage {stage.name}: steps {stage.first} to {stage.last} on {', '.join(stage.tasks)}, {size:,} parameters "
            f"trained{lost}"
        )

    def _arrange(self, layout: Layout, generator: torch.Generator | None = None) -> float:
        """Returns the error of what became shared."""
        if layout == self.layout:
            return 0.0
        assert self.beginning is not None
        error = arrange(self.model, layout, self.run.names, self.beginning, self._given, generator)
        self.layout, self._given = layout, None
        return error

    def _train(self, stage: Stage) -> None:
        """Only what the stage trains takes gradients."""
        if self.layout.settings is None:
            return
        if self._extends:
            train_parts(self.model, [f"embedding:{name}" for name in self.run.names])
            return
        chosen = [GATE] if GATE in stage.trains else []
        if ADAPTERS in stage.trains:
            chosen += [ADAPTERS, "heads", "embedding"]
        kinds = {part.split(":")[0] for part in parts_of(self.model)}
        train_parts(self.model, [part for part in chosen if part in kinds])

    def _isolate(self, stage: Stage, say: Say, note: Callable[[Conflict], None]) -> None:
        assert self.measure is not None
        if self._given is not None:
            self._arrange(self._layout_of(stage))  # of the adapters that the tasks begin with
        found = self.measure(stage.first)
        note(found)
        self.run.isolated = isolated([found], self._config.cosine_bound)
        names = self.run.isolated
        shown = ", ".join(names[:SHOWN_LAYERS]) + (
            f" and {len(names) - SHOWN_LAYERS} more" if names[SHOWN_LAYERS:] else ""
        )
        bound = f"a cosine of two tasks' gradients clearly below {self._config.cosine_bound:g}"
        if names:
            say(f"stage {stage.name}: {counted(len(names), 'layer')} of {len(found.modules)} with {bound}: {shown}")
        else:
            say(f"stage {stage.name}: no layer has {bound}: the tasks share one adapter, and there is nothing to gate")

    def leave(self, say: Say) -> None:
        """The run is over: no task is given any more, and where it is to be inferred, a classifier learns to.

        It reads the base's hidden states, which no step has changed, so it can be the last: the same rows and seed give
        the same classifier.
        """
        set_way(self.model, None)
        settings = self.layout.settings
        if not isinstance(settings, GateConfig) or settings.mode != INFERRED:
            return
        assert self.prompts is not None
        rows = {name: prompts() for name, prompts in self.prompts.items()}
        self.run.router = fit_router(self.model, rows, self.pad_id, self.run.seed)
        say(f"the classifier finds the task of {self.run.router['accuracy']:.1%} of held-out rows")

    # --- rows ---

    @contextlib.contextmanager
    def route(self, model: PreTrainedModel, where: Tensor) -> Iterator[None]:
        """Tells the model which way rows go (see `rankwise.train.tasked`), until it is told again."""
        if not self._is_together:
            set_way(model, where + self._first if self.needs_tasks else None)
        yield

    @contextlib.contextmanager
    def on(self, task: str) -> Iterator[None]:
        """In the block all rows are of this task."""
        if not self.needs_tasks:
            set_way(self.model, None)
            yield
            return
        with on_task(self.model, task):
            yield

    _is_together = False

    @property
    def needs_tasks(self) -> bool:
        """Whether the adapters of a row depend on its task now."""
        settings = self.layout.settings
        if settings is None:
            return False
        is_single = self.run.stage is not None and self.run.stage.kind == SINGLE
        return is_single or isinstance(settings, EmbeddingConfig) or settings.mode not in LEARNED

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """In the block all tasks' adapters of a layer take part in equal shares, whatever the rows' tasks are."""
        attachment = attachment_of(self.model)
        if attachment is None or attachment.mixture is None:
            yield
            return
        self._is_together = True
        try:
            with on_task(self.model, dict.fromkeys(self.run.names, 1 / len(self.run.names))):
                yield
        finally:
            self._is_together = False


def set_way(model: PreTrainedModel, where: Tensor | None) -> None:
    """`set_task`, where there is anything to set."""
    attachment = attachment_of(model)
    if attachment is not None and attachment.mixture is not None:
        set_task(model, where)
