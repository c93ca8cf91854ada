"""A run file: one dataclass for each section, read from YAML, a mapping, or a RunConfig, with `key=value` overrides.

Paths (`data.*`, `output`, `adapter.from`, a model's folder) are relative to the run file; those in overrides and in
mappings are relative to the current folder. A RunConfig that was read holds absolute paths.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from rankwise.adapters.config import LoraConfig
from rankwise.config import build, checked_value, to_dict
from rankwise.data.config import DataConfig
from rankwise.data.formats import FORMATS
from rankwise.errors import RequestError, did_you_mean
from rankwise.models.config import ModelConfig
from rankwise.ranks.config import MOVING, PLANNED, RESIZING, RanksConfig
from rankwise.recipes.run_tasks import (
    adapter_of_tasks,
    check_tasks,
    shared_of_extended,
    with_task_files,
    without_task_files,
)
from rankwise.recipes.run_yaml import FROM, absolute_paths, parse_override, read_yaml
from rankwise.tasks.config import TasksConfig
from rankwise.train.config import AUTO, TrainConfig
from rankwise.train.needs import NEEDS, remedy_for

ADAPTER_KINDS: dict[str, type[LoraConfig]] = {"lora": LoraConfig}
SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "adapter": LoraConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "ranks": RanksConfig,
    "tasks": TasksConfig,
}
"""Sections that are mappings; `output` stands beside them."""


@dataclass(frozen=True)
class StartFrom:
    """`adapter: {from: FOLDER}`: go on from an adapter that exists; its config says everything else."""

    folder: str


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on.

    Raises: RequestError where one section makes a setting of another one meaningless.
    """

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: LoraConfig | StartFrom = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    output: str | None = None

    def __post_init__(self) -> None:
        if self.tasks.data:
            check_tasks(self)
        self._check_adapter()
        self._check_ranks()
        self._check_moving_ranks()
        self._check_evaluation()
        self._check_rows()
        if self.train.sharding != "none" and self.model.is_quantized:
            raise RequestError(
                f"train.sharding: {self.train.sharding} cuts plain floating-point weights, and model.quantization: "
                f"{self.model.quantization} packs them with scales that belong to whole ones; set train.sharding=none "
                "(each process then holds the whole quantised base), or model.quantization=none"
            )

    def _check_rows(self) -> None:
        """The format is of the kind that the objective trains on; packing, where not given, is what it can do."""
        needs, format = self.train.needs, self.data.format
        if format != AUTO and (held := FORMATS[format].rows) != needs.rows:
            raise RequestError(
                f"train.objective: {self.train.objective} trains on {needs.rows}, data.format: {format} holds {held}; "
                f"{remedy_for(held)}, or another data.format"
            )
        if self.data.packing and not needs.packs:
            raise RequestError(
                f"data.packing (true) has no effect with train.objective: {self.train.objective}, whose rows can only "
                "be padded; leave it out, or set it to false"
            )
        if self.data.packing is None:
            object.__setattr__(self, "data", dataclasses.replace(self.data, packing=needs.packs))

    def _check_adapter(self) -> None:
        if not isinstance(self.adapter, LoraConfig):
            return
        check_task_type(self.adapter.task_type, "adapter.task_type", self.train.objective)
        if self.adapter.revision is not None:
            raise RequestError(
                f"adapter.revision ({self.adapter.revision}) is taken from model.revision; set that one instead"
            )

    def _check_ranks(self) -> None:
        """A policy that chooses ranks before training finds none chosen already."""
        if self.ranks.policy not in PLANNED:
            return
        if isinstance(self.adapter, StartFrom):
            raise RequestError(
                f"ranks.policy: {self.ranks.policy} has no effect with adapter.from, whose layers have their ranks; "
                "use fixed"
            )
        if self.adapter.rank_pattern:
            raise RequestError(
                f"adapter.rank_pattern has no effect with ranks.policy: {self.ranks.policy}, which gives every layer "
                "its rank; leave it out, or put it into ranks.plan of the policy layered"
            )

    def _check_moving_ranks(self) -> None:
        """What ranks that move can't do without, or can't be beside."""
        ranks, adapter = self.ranks, self.adapter
        if ranks.policy in RESIZING and self.train.optimizer == "adamw-8bit":
            raise RequestError(
                "train.optimizer: adamw-8bit keeps its state in blocks that can't be cut or grown, which "
                f"ranks.policy: {ranks.policy} does; use adamw"
            )
        if ranks.policy in MOVING and isinstance(adapter, StartFrom) and self.train.objective == "dpo":
            raise RequestError(
                f"ranks.policy: {ranks.policy} does not go with train.objective: dpo and adapter.from, whose factors "
                "as they began are the reference; use fixed, or a new adapter"
            )
        if ranks.start is None:
            return
        if isinstance(adapter, StartFrom):
            raise RequestError(
                f"ranks.start ({ranks.start}) has no effect with adapter.from, whose layers have their ranks; leave it "
                "out"
            )
        if adapter.rank_pattern:
            raise RequestError(
                f"ranks.start ({ranks.start}) and adapter.rank_pattern both say which rank layers begin with; leave "
                "one out"
            )

    def _check_evaluation(self) -> None:
        data, train = self.data, self.train
        if data.valid is not None and train.evaluates_never:
            raise RequestError(
                "data.valid has no effect: train.evaluate_every says never; set it to auto, or data.valid to null"
            )
        if data.valid_split not in (AUTO, 0) and train.evaluates_never:
            raise RequestError(
                f"data.valid_split ({data.valid_split}) has no effect: train.evaluate_every says never; set it to "
                "auto, or data.valid_split to 0"
            )
        if data.valid is None and data.valid_split == 0:
            self.check_not_evaluated("without data.valid")

    def check_not_evaluated(self, why: str) -> None:
        """Raises: RequestError for settings of an evaluation that there can't be; `why` ends "has no effect ..."."""
        train, every = self.train, self.train.evaluate_every
        if every != AUTO and not train.evaluates_never:
            raise RequestError(f"train.evaluate_every ({every}) has no effect {why}; give a file, or set it to null")
        for name, value in train.needs_evaluation.items():
            raise RequestError(f"train.{name} ({value}) has no effect {why}: it reads the loss on validation rows")
        for name, value, off in (("samples", train.samples, "0"), ("sample_tokens", train.sample_tokens, "null")):
            if value:
                raise RequestError(f"train.{name} ({value}) has no effect {why}; give a file, or set it to {off}")


def check_task_type(task_type: str | None, where: str, objective: str) -> None:
    """Raises: RequestError for an adapter of a task that the objective does not train; `where` names it in messages."""
    wanted = NEEDS[objective].task_type
    if task_type not in (None, wanted):
        raise RequestError(
            f"{where} ({task_type}) does not go with train.objective: {objective}, which trains a {wanted} adapter; "
            f"set it to {wanted}, or leave it out"
        )


def read_run(
    source: RunConfig | Mapping[str, Any] | str | os.PathLike[str], overrides: Sequence[str] = ()
) -> RunConfig:
    """The run that `source` (a YAML file, a mapping or a RunConfig) describes, with `key=value` overrides on top.

    Raises: RequestError for a file that can't be read, an unknown key (naming the nearest), or a value that is wrong.
    """
    here = Path.cwd()
    if isinstance(source, RunConfig):
        document, folder = run_document(source), here
    elif isinstance(source, Mapping):
        document, folder = {str(key): value for key, value in source.items()}, here
    else:
        document, folder = read_yaml(Path(source)), Path(source).absolute().parent
    above: dict[str, Any] = {}
    for override in overrides:
        above = _merged(above, absolute_paths(parse_override(override), here))
    document = absolute_paths(document, folder)
    if isinstance(above.get("adapter"), Mapping) and FROM in above["adapter"]:
        document["adapter"] = {}  # an adapter that exists says everything that the file's section says
    return build_run(_merged(document, above))


def rank_hint(
    source: RunConfig | Mapping[str, Any] | str | os.PathLike[str], overrides: Sequence[str] = ()
) -> str | None:
    """A line for a run file or mapping that says nothing of ranks; None where it does, or where nobody can tell."""
    if isinstance(source, RunConfig):
        return None
    document: Mapping[str, Any] = source if isinstance(source, Mapping) else read_yaml(Path(source))
    for override in overrides:
        document = _merged(document, parse_override(override))
    adapter = document.get("adapter") or {}
    if (
        "r" in adapter
        or FROM in adapter
        or adapter.get("rank_pattern")
        or (document.get("ranks") or {}).get("policy", "fixed") != "fixed"
    ):
        return None
    return (
        f"hint: no adapter.r: every layer gets rank {LoraConfig().r}. 1 to 4 do for a format or a style, 4 to 8 "
        "for one narrow task, 8 to 16 for several, 64 and more for a new domain: docs/ranks.md"
    )


def build_run(document: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from a mapping whose paths are absolute. Raises: as `read_run`."""
    check_keys(document)
    document = with_task_files(document)
    sections: dict[str, Any] = {
        name: build(kind, document.get(name), name) for name, kind in SECTIONS.items() if name != "adapter"
    }
    output = document.get("output")
    if output is not None and not isinstance(output, str):
        raise RequestError(f"output must be a folder, not {output!r}")
    tasks: TasksConfig = sections["tasks"]
    if tasks.extend is not None and tasks.data:
        adapter = StartFrom(shared_of_extended(document, tasks.extend))
    elif tasks.adapters is not None:
        adapter = adapter_of_tasks(document, tasks.adapters)
    else:
        adapter = _adapter(document.get("adapter"))
    return RunConfig(**sections, adapter=adapter, output=output)


def _adapter(section: Mapping[str, Any] | None) -> LoraConfig | StartFrom:
    section = section or {}
    if FROM in section:
        others = [key for key in section if key != FROM]
        if others:
            raise RequestError(
                f"adapter.{others[0]} has no effect with adapter.from, whose own config is used; leave it out"
            )
        return StartFrom(checked_value(section[FROM], str, f"adapter.{FROM}"))
    kind = checked_value(section.get("kind", "lora"), str, "adapter.kind")
    if kind not in ADAPTER_KINDS:
        raise RequestError(f"unknown adapter.kind {kind!r}{did_you_mean(kind, ADAPTER_KINDS)}")
    try:
        return build(ADAPTER_KINDS[kind], section, "adapter")
    except RequestError as error:
        raise RequestError(with_section(str(error))) from None


def with_section(message: str) -> str:
    """The library's message about a LoraConfig, which begins with a field, as that of a run file: `adapter.r`."""
    names = "|".join(item.name for item in fields(LoraConfig))
    return re.sub(rf"^(unknown )?({names})\b", r"\1adapter.\2", message)


def check_keys(document: Mapping[str, Any]) -> None:
    """Every key is known. Raises: RequestError naming the nearest known key, in whatever section it is."""
    inside = [f"{name}.{item.name}" for name, kind in SECTIONS.items() for item in fields(kind)]
    inside.append(f"adapter.{FROM}")
    top = [*SECTIONS, "output"]
    for key, value in document.items():
        if key not in top:
            raise RequestError(f"unknown setting '{key}'{did_you_mean(key, [*top, *inside])}")
        if key in SECTIONS and value is not None and not isinstance(value, Mapping):
            raise RequestError(f"{key} must be a mapping of settings, not {value!r}")
        for name in value if key in SECTIONS and value else ():
            if f"{key}.{name}" not in inside:
                raise RequestError(f"unknown setting '{key}.{name}'{did_you_mean(f'{key}.{name}', inside)}")


def run_document(run: RunConfig) -> dict[str, Any]:
    """The run as plain values, in the order of a run file; `read_run` of it gives an equal run."""
    adapter = {FROM: run.adapter.folder} if isinstance(run.adapter, StartFrom) else to_dict(run.adapter)
    if run.tasks.adapters is not None or run.tasks.extend is not None:
        adapter = {}
    return {
        "model": to_dict(run.model),
        "adapter": adapter,
        "data": without_task_files(run) if run.tasks.data else to_dict(run.data),
        "train": to_dict(run.train),
        "ranks": to_dict(run.ranks),
        "tasks": to_dict(run.tasks),
        "output": run.output,
    }


def flat_settings(run: RunConfig) -> dict[str, Any]:
    """The settings of the run by their names on the command line: `train.lr`."""
    document = run_document(run)
    sections = {name: values if isinstance(values, dict) else {"": values} for name, values in document.items()}
    return {f"{name}.{key}".rstrip("."): value for name, values in sections.items() for key, value in values.items()}


def run_yaml(run: RunConfig) -> str:
    """The run as the text of a run file."""
    return yaml.safe_dump(run_document(run), sort_keys=False, allow_unicode=True)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`: mappings of a section join, anything else replaces."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result
