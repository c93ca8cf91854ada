"""What a suite asks for: methods by tasks by seeds, and how its table compares them. From YAML; pure.

A bench is a folder with `tasks.yaml` (a run file without adapter for each task), `suites/`, the store and `tables/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankwise.bench.kinds import ADAPTER, COMBINE, GATE, KINDS, OF_ALL, SETTINGS, TASKS, UNTRAINED
from rankwise.config import build
from rankwise.errors import RequestError, did_you_mean

COMPARISON, RATES, SEVERAL = "comparison", "rates", "tasks"
TABLES = {
    COMPARISON: "each method against the reference",
    RATES: "which learning rate is best for each method",
    SEVERAL: "methods on several tasks at once against the reference: mean, each task, the worst one, forgetting",
}
"""What a suite's table shows."""

_NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class NewTask:
    """The last task of a suite, learned by its vector alone after the others have been trained.

    Args:
        rows: the first of its training rows, which are all that is seen of it.
        steps: how many, of `train.batch_size` rows.
        lr: Adam's rate.
    """

    rows: int = 64
    steps: int = 60
    lr: float = 0.05

    def __post_init__(self) -> None:
        if self.rows < 1 or self.steps < 1 or self.lr <= 0:
            raise RequestError(f"rows ({self.rows}), steps ({self.steps}) and lr ({self.lr:g}) must be above 0")


@dataclass(frozen=True)
class Method:
    """A row of a table.

    Args:
        lr: a rate; a grid of rates from which one is chosen on validation rows; the name of a method whose rate it has;
            none where nothing is trained by steps.
        kind: what is trained, a key of `KINDS`.
        adapter: settings of the run file's section.
        ranks: likewise.
        cut: the rank that the adapter is cut to after training, as `convert-rank` does it: to the prefix where it was
            trained nested, else to the best approximation.
        train: settings over those of the task, the rate apart.
        singles: the method (of kind `adapter`) whose adapters of the same seed the tasks begin with.
        tasks: settings of the run file's section, but for `data` and `adapters`, which the suite says.
        combine: `method` and its settings, as of `rankwise combine`.
        gate: settings of the gate over the adapters of `singles`.
        new_task: of task embeddings: the suite's last task is left out and then learned by its vector: see NewTask.
    """

    lr: float | list[float] | str | None = None
    kind: str = ADAPTER
    adapter: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    ranks: dict[str, Any] = field(default_factory=dict)
    cut: int | None = None
    singles: str | None = None
    tasks: dict[str, Any] = field(default_factory=dict)
    combine: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)
    new_task: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError(f"unknown kind '{self.kind}'{did_you_mean(self.kind, KINDS)}")
        if self.cut is not None and self.cut < 1:
            raise RequestError(f"cut must be a rank from 1, not {self.cut}")
        for name in sorted({name for names in SETTINGS.values() for name in names}):
            if getattr(self, name) not in (None, {}) and name not in SETTINGS[self.kind]:
                raise RequestError(f"{name} has no effect with kind: {self.kind}; leave it out")
        if (self.lr is None) != (self.kind in UNTRAINED):
            raise RequestError(
                f"lr has no effect with kind: {self.kind}, which is not trained; leave it out"
                if self.kind in UNTRAINED
                else "lr is missing: give a rate, or a list of rates to choose from on validation rows"
            )
        for name in ("lr", "seed"):
            if name in self.train:
                raise RequestError(f"train.{name} is set by the suite; give {name} beside it, not in train:")
        if len(set(self.rates)) < len(self.rates) or not self.rates:
            raise RequestError(f"lr ({self.lr}) must be different rates")
        self._check_of_all()

    def _check_of_all(self) -> None:
        for name in ("data", "adapters"):
            if name in self.tasks:
                raise RequestError(f"tasks.{name} is said by the suite; leave it out")
        if self.kind in (COMBINE, GATE) and self.singles is None:
            raise RequestError(f"kind: {self.kind} needs singles: the method whose adapters it is made of")
        if self.kind == TASKS and self.singles is not None and self.adapter:
            raise RequestError("adapter has no effect with singles, whose own settings hold; leave it out")
        if self.kind == COMBINE and "method" not in self.combine:
            raise RequestError("combine.method is missing; see `rankwise combine`")
        if self.kind == GATE and "mode" not in self.gate:
            raise RequestError("gate.mode is missing: hard or inferred")
        if self.new_task is not None and "embedding" not in self.tasks:
            raise RequestError("new_task is of task embeddings; give tasks.embedding, or leave it out")

    @property
    def is_of_all(self) -> bool:
        """Whether a cell of it is on all tasks of the suite."""
        return self.kind in OF_ALL

    @property
    def rates(self) -> list[float | None]:
        """The rates to choose from, lowest first; [None] for what is not trained, or has another method's."""
        if isinstance(self.lr, str):
            return [None]
        return sorted(self.lr) if isinstance(self.lr, list) else [self.lr]  # type: ignore[type-var]

    @property
    def added(self) -> NewTask | None:
        """`new_task`, read."""
        return None if self.new_task is None else build(NewTask, self.new_task, "new_task")


@dataclass(frozen=True)
class Tuning:
    """On which seed, and which tasks (none given: all), a method's learning rate is chosen."""

    seed: int = 0
    tasks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Gain:
    """A difference of two methods' losses."""

    base: str
    to: str


@dataclass(frozen=True)
class Margin:
    """What counts as no worse: so large a share of the gain from `base` to `to`, on validation rows."""

    base: str
    to: str
    share: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise RequestError(f"margin.share ({self.share}) must be between 0 and 1")


@dataclass(frozen=True)
class Answers:
    """Of which rows of the table answers are generated and scored, beside the losses.

    Args:
        methods: their names, each with one cell for each task.
        seed: theirs; not that on which rates are chosen, or a cell would be trained twice.
        rows: of each task, the first test rows.
        max_new_tokens: of an answer.
    """

    methods: list[str]
    seed: int
    rows: int = 60
    max_new_tokens: int = 96

    def __post_init__(self) -> None:
        if not self.methods or self.rows < 1 or self.max_new_tokens < 1:
            raise RequestError(
                f"methods ({self.methods}) must name one at least, rows ({self.rows}) and max_new_tokens "
                f"({self.max_new_tokens}) must be above 0"
            )


@dataclass(frozen=True)
class SuiteFile:
    """A suite's YAML, checked by types; `Suite` is checked by meaning."""

    title: str
    tasks: list[str]
    seeds: int
    methods: dict[str, Any]
    table: str = COMPARISON
    reference: str | None = None
    tuning: dict[str, Any] = field(default_factory=dict)
    margin: dict[str, Any] | None = None
    share_of: dict[str, Any] | None = None
    answers: dict[str, Any] | None = None
    default_of: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Suite:
    """Methods by tasks by seeds.

    Args:
        title, note: what stands above the table.
        table: a key of `TABLES`.
        tasks: names of tasks, all of one kind of model.
        seeds: 0, 1, ...
        methods: by name, in the order of the rows.
        reference: the method that the others are compared with; None for a table of rates.
        tuning: where learning rates are chosen.
        margin: of "no worse"; None: that is never said.
        share_of: the gain of which each row shows its share; None: no such column.
        answers: whose answers are generated; None: nobody's.
        default_of: the setting whose default the reference stands for: a last sentence says whether the table justifies
            another; None: no such sentence.
    """

    title: str
    table: str
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    methods: Mapping[str, Method]
    reference: str | None
    tuning: Tuning
    margin: Margin | None
    share_of: Gain | None
    answers: Answers | None = None
    default_of: str | None = None
    note: str = ""

    @property
    def tuning_tasks(self) -> tuple[str, ...]:
        """The tasks on which rates are chosen."""
        return tuple(self.tuning.tasks) or self.tasks

    def is_tuned(self, method: str) -> bool:
        """Whether a method's rate is chosen from a grid."""
        return self.table != RATES and len(self.methods[method].rates) > 1

    @property
    def kept(self) -> set[str]:
        """Methods whose adapters others are made of."""
        return {method.singles for method in self.methods.values() if method.singles is not None}


def suite_from(document: Mapping[str, Any], known_tasks: Sequence[str]) -> Suite:
    """The suite of a YAML document.

    Raises: RequestError for an unknown setting, method or task, and for settings without effect.
    """
    raw = build(SuiteFile, document, "suite")
    methods = {name: _method(name, value) for name, value in raw.methods.items()}
    if not methods or not raw.tasks or raw.seeds < 1:
        raise RequestError("a suite needs a method, a task and a seed at least")
    if raw.table not in TABLES:
        raise RequestError(f"unknown table '{raw.table}'{did_you_mean(raw.table, TABLES)}")
    suite = Suite(
        raw.title, raw.table, tuple(raw.tasks), tuple(range(raw.seeds)), methods, raw.reference,
        build(Tuning, raw.tuning, "tuning"), None if raw.margin is None else build(Margin, raw.margin, "margin"),
        None if raw.share_of is None else build(Gain, raw.share_of, "share_of"),
        None if raw.answers is None else build(Answers, raw.answers, "answers"), raw.default_of,
        raw.note,
    )  # fmt: skip
    _check(suite, known_tasks)
    _check_methods(suite)
    if suite.answers is not None:
        _check_answers(suite, suite.answers)
    if suite.default_of is not None and suite.table != COMPARISON:
        raise RequestError(f"default_of has no effect in table: {suite.table}; leave it out")
    return suite


def _method(name: str, value: Any) -> Method:
    if not _NAME.fullmatch(name):
        raise RequestError(f"a method's name is made of letters, digits and . + - _, not '{name}'")
    if not isinstance(value, Mapping):
        raise RequestError(f"methods.{name} must be a mapping of settings, not {value!r}")
    try:
        return build(Method, value, f"methods.{name}")
    except RequestError as error:
        text = str(error)
        raise RequestError(text if f"methods.{name}" in text else f"methods.{name}: {text}") from None


def _check(suite: Suite, known_tasks: Sequence[str]) -> None:
    for task in (*suite.tasks, *suite.tuning_tasks):
        if task not in known_tasks:
            raise RequestError(f"unknown task '{task}'{did_you_mean(task, known_tasks)}")
    for task in suite.tuning.tasks:
        if task not in suite.tasks:
            raise RequestError(f"tuning.tasks: '{task}' is not one of the suite's tasks; add it there")
    if suite.tuning.seed not in suite.seeds:
        raise RequestError(f"tuning.seed ({suite.tuning.seed}) is not one of the suite's seeds, 0 to {suite.seeds[-1]}")
    named = {"reference": suite.reference}
    for place, gain in (("margin", suite.margin), ("share_of", suite.share_of)):
        if gain is not None:
            named |= {f"{place}.base": gain.base, f"{place}.to": gain.to}
    if suite.table == RATES:
        given = [place for place, name in named.items() if name is not None]
        if given:
            raise RequestError(f"{given[0]} has no effect in a table of rates; leave it out")
        return
    if suite.reference is None:
        raise RequestError("reference is missing: the method that the others are compared with")
    for place, name in named.items():
        if name not in suite.methods:
            raise RequestError(f"{place}: unknown method '{name}'{did_you_mean(str(name), suite.methods)}")
    if suite.table == SEVERAL and len(suite.tasks) < 2:
        raise RequestError("a table of tasks needs two tasks at least")


def _check_answers(suite: Suite, answers: Answers) -> None:
    if suite.table != COMPARISON:
        raise RequestError(f"answers has no effect in table: {suite.table}; leave it out")
    for name in answers.methods:
        if name not in suite.methods:
            raise RequestError(f"answers.methods: unknown method '{name}'{did_you_mean(name, suite.methods)}")
    if answers.seed not in suite.seeds:
        raise RequestError(f"answers.seed ({answers.seed}) is not one of the suite's seeds, 0 to {suite.seeds[-1]}")
    if answers.seed == suite.tuning.seed and any(suite.is_tuned(name) for name in answers.methods):
        raise RequestError(
            f"answers.seed ({answers.seed}) is that on which rates are chosen, and its cells would be trained twice; "
            "give another one"
        )


def _check_methods(suite: Suite) -> None:
    """What methods say of each other, and which tables they are for."""
    for name, method in suite.methods.items():
        if method.is_of_all and suite.table != SEVERAL:
            raise RequestError(f"methods.{name}: kind: {method.kind} is for table: {SEVERAL}")
        if method.added is not None and len(suite.tasks) < 3:
            raise RequestError(f"methods.{name}: new_task needs three tasks at least, two to begin with")
        if method.singles is not None:
            other = suite.methods.get(method.singles)
            if other is None or other.kind != ADAPTER or other.cut is not None:
                raise RequestError(
                    f"methods.{name}.singles: '{method.singles}' is no method of kind: adapter without cut"
                    f"{did_you_mean(method.singles, suite.methods)}"
                )
        if isinstance(method.lr, str):
            other = suite.methods.get(method.lr)
            if other is None or other.kind in UNTRAINED or isinstance(other.lr, str) or suite.table == RATES:
                raise RequestError(
                    f"methods.{name}.lr: '{method.lr}' is no method with rates of its own, in a table that compares"
                    f"{did_you_mean(method.lr, suite.methods)}"
                )
