"""Several tasks in one run: the `tasks:` section of a run file.

Names of tasks become names of folders and of metrics, so they can't leave theirs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from rankwise.adapters.gate_config import LEARNED, SOFT, EmbeddingConfig, GateConfig, check_names
from rankwise.config import build
from rankwise.errors import RequestError, did_you_mean

SIZE, TEMPERATURE, BEHIND = "size", "temperature", "behind"
SAMPLINGS = (SIZE, TEMPERATURE, BEHIND)
SINGLE, JOINT, SHARED = "single", "joint", "shared"
KINDS = (SINGLE, JOINT, SHARED)
GATE, ADAPTERS = "gate", "adapters"
PARTS = (GATE, ADAPTERS)
AUTO = "auto"
BESIDE_EXTEND = ("data", "extend", "sampling")
"""Settings of the section that go with `extend`: the rest is about other adapters."""

DEFAULT_TEMPERATURE = 2.0
DEFAULT_CONFLICT_ROWS = 32


@dataclass(frozen=True)
class TaskFiles:
    """Data files of one task. `train`, `valid`: as in the section `data`."""

    train: str | list[str]
    valid: str | list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("train", "valid"):
            value = getattr(self, name)
            if value is not None and (not value or not all(value)):
                raise RequestError(f"{name} is {value!r}; give the path of a data file, or a list of paths")


@dataclass(frozen=True)
class SamplingConfig:
    """How often a row of each task is drawn.

    Args:
        by: `size` (every row as often as any other), `temperature` (size ** (1 / temperature)), or `behind` (by how far
            the task's validation loss is above that of its own single adapter).
        temperature: of `temperature`: 1 draws by size, higher ones make shares more equal; not given: 2.
        references: of `behind`: the validation loss of each task's single adapter, in nats.

    Raises: RequestError for a value out of range, or a setting without effect.
    """

    by: str = SIZE
    temperature: float | None = None
    references: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.by not in SAMPLINGS:
            raise RequestError(f"tasks.sampling.by can't be '{self.by}'{did_you_mean(self.by, SAMPLINGS)}")
        if self.temperature is not None and self.by != TEMPERATURE:
            raise RequestError(
                f"tasks.sampling.temperature ({self.temperature:g}) has no effect with by: {self.by}; leave it out, or "
                "use by: temperature"
            )
        if self.temperature is not None and not (self.temperature >= 1 and math.isfinite(self.temperature)):
            raise RequestError(
                f"tasks.sampling.temperature must be 1 or more, not {self.temperature:g}; 1 draws by size, higher ones "
                "make shares more equal"
            )
        if self.references is not None and self.by != BEHIND:
            raise RequestError(
                f"tasks.sampling.references have no effect with by: {self.by}; leave them out, or use by: behind"
            )
        for task, loss in (self.references or {}).items():
            if not (loss > 0 and math.isfinite(loss)):
                raise RequestError(f"tasks.sampling.references.{task} must be a loss above 0, not {loss}")


@dataclass(frozen=True)
class StageConfig:
    """A part of the run.

    Args:
        kind: `single` (each row goes through its own task's adapter), `joint` (through the gate) or `shared` (all tasks
            share one adapter a layer, with a vector for each task where `tasks.embedding` is given).
        steps, epochs: how long; one stage may say neither, and takes what is left of the run.
        lr: its highest learning rate; not given: train.lr.
        tasks: those that are trained on in it; not given: all.
        train: of `joint`: what is trained: `gate`, `adapters`; not given: both, as far as there is something to train.

    Raises: RequestError for a value out of range, or a setting without effect.
    """

    kind: str
    steps: int | None = None
    epochs: int | float | None = None
    lr: float | None = None
    tasks: list[str] | None = None
    train: list[str] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError(f"tasks.stages: a kind can't be '{self.kind}'{did_you_mean(self.kind, KINDS)}")
        if self.steps is not None and self.epochs is not None:
            raise RequestError(
                f"tasks.stages: steps ({self.steps}) and epochs ({self.epochs}) of '{self.kind}' both say how long it "
                "is; leave one out"
            )
        if self.steps is not None and self.steps < 1:
            raise RequestError(f"tasks.stages: steps of '{self.kind}' must be 1 or more, not {self.steps}")
        if self.epochs is not None and not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise RequestError(f"tasks.stages: epochs of '{self.kind}' must be more than 0, not {self.epochs}")
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise RequestError(f"tasks.stages: lr of '{self.kind}' must be more than 0, not {self.lr}")
        if self.tasks is not None and not self.tasks:
            raise RequestError(f"tasks.stages: tasks of '{self.kind}' is empty; name some, or leave it out for all")
        self._check_trained()

    def _check_trained(self) -> None:
        if self.train is None:
            return
        if self.kind != JOINT:
            raise RequestError(
                f"tasks.stages: train ({', '.join(self.train)}) has no effect on '{self.kind}', which has nothing but "
                "adapters to train; leave it out"
            )
        for name in self.train:
            if name not in PARTS:
                raise RequestError(f"tasks.stages: train can't have '{name}'{did_you_mean(name, PARTS)}")
        if not self.train:
            raise RequestError("tasks.stages: train is empty; name gate, adapters or both, or leave it out")


@dataclass(frozen=True)
class TasksConfig:
    """Several data sets in one run.

    Args:
        data: files of each task: `{NAME: {train: FILE, valid: FILE}}`, in place of `data.train` and `data.valid`.
        extend: a folder of task embeddings, or a run that made one: the tasks of `data` are new ones, each learns its
            vector, and nothing else changes.
        gate: one adapter for each task in every adapted layer, and how they are chosen or mixed (`mode`, `per`,
            `temperature`, `k`): see GateConfig.
        embedding: a vector for each task on the adapter that they share: see EmbeddingConfig.
        adapters: the trained adapter that each task begins with; all tasks, or none.
        train_adapters: whether the adapters are trained along with the gate; not given: yes.
        sampling: how often rows of each task are drawn: see SamplingConfig.
        replay: the share of rows that a stage draws from tasks of earlier stages that it does not train itself.
        stages: the parts of the run, in their order: see StageConfig; not given: one.
        isolate: which layers have an adapter for each task from the first joint stage on, while the tasks share one
            in the others: `auto` (those where the tasks' gradients conflict), or a list of names; not given: all.
        isolate_below: of `auto`: the cosine of two tasks' gradients below which a layer is isolated, where it is there
            beyond noise (see rankwise.tasks.conflict); not given: 0.
        conflict_every: steps between two measurements of the conflict of the tasks' gradients; not given: none.
        conflict_rows: rows of each task that such a measurement takes; not given: 32.

    Raises: RequestError for a value out of range, or a setting without effect.
    """

    data: dict[str, Any] = field(default_factory=dict)
    extend: str | None = None
    gate: dict[str, Any] | None = None
    embedding: dict[str, Any] | None = None
    adapters: dict[str, str] | None = None
    train_adapters: bool | None = None
    sampling: dict[str, Any] | None = None
    replay: float | None = None
    stages: list[dict[str, Any]] | None = None
    isolate: str | list[str] | None = None
    isolate_below: float | None = None
    conflict_every: int | None = None
    conflict_rows: int | None = None

    def __post_init__(self) -> None:
        if not self.data:
            given = [item.name for item in fields(self) if getattr(self, item.name) not in (None, {})]
            if given:
                raise RequestError(f"tasks.{given[0]} has no effect without tasks.data; name the tasks and their files")
            return
        if self.extend is not None:
            self._check_extension()
        elif len(self.data) < 2:
            raise RequestError(
                f"tasks.data names one task, '{next(iter(self.data))}'; name two or more, or use data: for one"
            )
        with said_of("data"):
            check_names(self.data)
        self._check_files()
        self._check_adapters()
        self._check_sampling()
        self._check_stages()
        self._check_isolation()
        self._check_conflict()

    # --- the parts, read ---

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, in their order."""
        return tuple(self.data)

    @property
    def files(self) -> dict[str, TaskFiles]:
        """The data files of each task."""
        found: dict[str, TaskFiles] = {}
        for name, values in self.data.items():
            with said_of(f"data.{name}"):
                found[name] = build(TaskFiles, values, f"tasks.data.{name}")
        return found

    @property
    def gating(self) -> GateConfig | None:
        """`gate`, read."""
        if self.gate is None:
            return None
        with said_of("gate"):
            gate = build(GateConfig, self.gate, "tasks.gate")
            gate.check_tasks(self.data)
        return gate

    @property
    def embedded(self) -> EmbeddingConfig | None:
        """`embedding`, read."""
        if self.embedding is None:
            return None
        with said_of("embedding"):
            return build(EmbeddingConfig, self.embedding, "tasks.embedding")

    @property
    def drawn(self) -> SamplingConfig:
        """`sampling`, read."""
        return build(SamplingConfig, self.sampling, "tasks.sampling")

    @property
    def plan(self) -> tuple[StageConfig, ...]:
        """`stages`, read; the one that there is where none are given."""
        if self.stages is None:
            return (StageConfig(JOINT if self.gate is not None else SHARED),)
        return tuple(build(StageConfig, stage, f"tasks.stages[{i}]") for i, stage in enumerate(self.stages))

    @property
    def trains_adapters(self) -> bool:
        """`train_adapters`, filled in."""
        return self.train_adapters is not False

    @property
    def cosine_bound(self) -> float:
        """`isolate_below`, filled in."""
        return 0.0 if self.isolate_below is None else self.isolate_below

    @property
    def rows_for_conflict(self) -> int:
        """`conflict_rows`, filled in."""
        return DEFAULT_CONFLICT_ROWS if self.conflict_rows is None else self.conflict_rows

    @property
    def measures_conflict(self) -> bool:
        """Whether the conflict is measured at all."""
        return self.conflict_every is not None or self.isolate == AUTO

    def trained_in(self, stage: StageConfig) -> tuple[str, ...]:
        """What a stage trains: some of PARTS."""
        if stage.kind != JOINT:
            return (ADAPTERS,)
        gating = self.gating
        assert gating is not None
        possible = [
            name for name, is_there in ((GATE, gating.mode in LEARNED), (ADAPTERS, self.trains_adapters)) if is_there
        ]
        return tuple(possible if stage.train is None else stage.train)

    # --- checks ---

    def _check_extension(self) -> None:
        given = [item.name for item in fields(self) if getattr(self, item.name) is not None]
        other = next((name for name in given if name not in BESIDE_EXTEND), None)
        if other is not None:
            raise RequestError(
                f"tasks.{other} does not go with tasks.extend, which learns the new tasks' vectors and leaves all else "
                "as it is; leave it out"
            )

    def _check_known(self, names: Any, where: str) -> None:
        for name in names:
            if name not in self.data:
                raise RequestError(f"{where}: there is no task '{name}'{did_you_mean(str(name), self.names)}")

    def _check_files(self) -> None:
        with_valid = [name for name, files in self.files.items() if files.valid is not None]
        without = [name for name in self.data if name not in with_valid]
        if with_valid and without:
            raise RequestError(
                f"tasks.data: '{with_valid[0]}' has a valid file and '{without[0]}' has none; give all tasks one, or "
                "none (rows are then held out: data.valid_split)"
            )

    def _check_adapters(self) -> None:
        if self.embedded is not None and not any(stage.kind == SHARED for stage in self.plan):
            raise RequestError(
                "tasks.embedding has no effect: vectors belong to the adapter that tasks share, and no stage is "
                "shared; add one, or leave out the embedding or the gate"
            )
        if self.train_adapters is not None and (self.gate is None or not any(s.kind == JOINT for s in self.plan)):
            raise RequestError(
                f"tasks.train_adapters ({str(self.train_adapters).lower()}) has no effect without a gate and a joint "
                "stage; leave it out"
            )
        if self.adapters is None:
            return
        self._check_known(self.adapters, "tasks.adapters")
        missing = [name for name in self.data if name not in self.adapters]
        if missing:
            raise RequestError(
                f"tasks.adapters has {len(self.adapters)} for {len(self.data)} tasks: none for '{missing[0]}'; give "
                "each task one, or leave them out"
            )
        if self.plan[0].kind == SHARED:
            raise RequestError(
                "tasks.adapters have no effect: the first stage is shared, which has one adapter for all; begin with "
                "single or joint, or use adapter.from"
            )

    def _check_sampling(self) -> None:
        sampling = self.drawn
        if sampling.references is not None:
            self._check_known(sampling.references, "tasks.sampling.references")
        if sampling.by == BEHIND:
            first = self.plan[0]
            measured = (first.tasks or self.names) if first.kind == SINGLE else ()
            missing = [name for name in self.data if name not in (sampling.references or {}) and name not in measured]
            if missing:
                raise RequestError(
                    f"tasks.sampling.by behind needs the validation loss of each task's single adapter: "
                    f"tasks.sampling.references has none for '{missing[0]}' (a first stage of kind single gives them)"
                )

    def _check_stages(self) -> None:
        plan = self.plan
        if not plan:
            raise RequestError("tasks.stages is empty; name stages, or leave it out for one")
        if self.gate is not None and not any(stage.kind == JOINT for stage in plan):
            raise RequestError("tasks.gate has no effect: no stage is joint; add one, or leave out the gate")
        for stage in plan:
            self._check_known(stage.tasks or (), "tasks.stages")
            if stage.kind == JOINT and self.gate is None:
                raise RequestError("tasks.stages: a joint stage goes through a gate; give tasks.gate, or use shared")
            if stage.kind == JOINT:
                self._check_parts(stage)
        if sum(stage.steps is None and stage.epochs is None for stage in plan) > 1:
            raise RequestError(
                "tasks.stages: only one stage may say nothing of its length; give the others steps or epochs"
            )
        unseen = [name for name in self.data if all(name not in (stage.tasks or self.names) for stage in plan)]
        if unseen:
            raise RequestError(
                f"tasks.stages: no stage trains on task '{unseen[0]}'; name it in one, or leave it out of tasks.data"
            )
        if self.replay is None:
            return
        if not 0 < self.replay < 1:
            raise RequestError(f"tasks.replay must be a fraction between 0 and 1, not {self.replay}; 0.1 is usual")
        if not any(earlier_tasks(self, index) for index in range(len(plan))):
            raise RequestError(
                f"tasks.replay ({self.replay:g}) has no effect: no stage leaves out a task of an earlier one; give "
                "stages their tasks, or leave it out"
            )

    def _check_parts(self, stage: StageConfig) -> None:
        gating = self.gating
        assert gating is not None
        trained = self.trained_in(stage)
        if GATE in trained and gating.mode not in LEARNED:
            raise RequestError(
                f"tasks.stages: the gate can't be trained with mode {gating.mode}, which learns no mixture; use soft"
            )
        if GATE in trained and gating.k == 1:
            raise RequestError(
                "tasks.gate.k 1 leaves a trained gate nothing to learn: the one adapter that takes part always has the "
                f"share 1, so its logits have no gradient; raise k, choose mode {SOFT}, or leave out the gate (train: "
                "[adapters])"
            )
        if ADAPTERS in trained and not self.trains_adapters:
            raise RequestError("tasks.stages: train has adapters, and tasks.train_adapters is false; leave one out")
        if not trained:
            raise RequestError(
                f"a joint stage with tasks.gate.mode {gating.mode} and tasks.train_adapters false has nothing to "
                "train; set that to true, or use soft"
            )

    def _check_isolation(self) -> None:
        if self.isolate_below is not None and self.isolate != AUTO:
            raise RequestError(
                f"tasks.isolate_below ({self.isolate_below:g}) has no effect without tasks.isolate: auto"
            )
        if self.isolate_below is not None and not -1 < self.isolate_below <= 1:
            raise RequestError(f"tasks.isolate_below is a cosine, above -1 and at most 1, not {self.isolate_below:g}")
        if self.isolate is None:
            return
        if isinstance(self.isolate, str) and self.isolate != AUTO:
            raise RequestError(f"tasks.isolate can't be '{self.isolate}'; give auto, or a list of names of layers")
        if not self.isolate:
            raise RequestError("tasks.isolate is empty; name layers, or leave it out: then all layers are")
        if not any(stage.kind == JOINT for stage in self.plan):
            raise RequestError("tasks.isolate has no effect without a joint stage; add one, or leave it out")
        joint = [stage for stage in self.plan if stage.kind == JOINT]
        if self.isolate == AUTO and any(ADAPTERS not in self.trained_in(stage) for stage in joint):
            raise RequestError(
                "tasks.isolate: auto puts one adapter in place of the tasks' own where they don't conflict, and a "
                "joint stage that trains no adapters leaves it the mean that it begins as; train them, or name layers"
            )

    def _check_conflict(self) -> None:
        if self.conflict_every is not None and self.conflict_every < 1:
            raise RequestError(f"tasks.conflict_every must be 1 or more, not {self.conflict_every}")
        if self.conflict_rows is not None and not self.measures_conflict:
            raise RequestError(
                f"tasks.conflict_rows ({self.conflict_rows}) has no effect without tasks.conflict_every or isolate: "
                "auto; leave it out"
            )
        if self.conflict_rows is not None and self.conflict_rows < 2:
            raise RequestError(
                f"tasks.conflict_rows must be 2 or more (two batches of each task), not {self.conflict_rows}"
            )


def earlier_tasks(config: TasksConfig, index: int) -> tuple[str, ...]:
    """Tasks of stages before the one of that index that it does not train itself, in their order."""
    own = set(config.plan[index].tasks or config.names)
    before = {name for stage in config.plan[:index] for name in stage.tasks or config.names}
    return tuple(name for name in config.names if name in before - own)


@contextlib.contextmanager
def said_of(where: str) -> Iterator[None]:
    """Errors of the block say which part of the section they are about."""
    try:
        yield
    except RequestError as error:
        message = str(error)
        raise RequestError(message if f"tasks.{where}" in message else f"tasks.{where}: {message}") from None
