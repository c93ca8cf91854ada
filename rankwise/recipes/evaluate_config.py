"""What an evaluation is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.errors import RequestError, did_you_mean
from rankwise.train.config import SHARDINGS


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of an evaluation.

    Args:
        data: the data file; None takes the run's test file, or its valid file.
        metrics: names; None takes all that the data allows.
        rows: the first so many rows; None takes all.
        batch_size: rows at a time.
        max_new_tokens: the longest answer; None takes 128.
        precision: fp32, bf16 or auto.
        max_length, chat_template: in place of the run's, or of the defaults.
        copy: whether the prompt itself is scored as an answer too.
        sharding: of the model among several processes: as `train.sharding` of a run.
        task: of a gate's, which the rows are of.
    """

    data: str | None = None
    metrics: tuple[str, ...] | None = None
    rows: int | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    precision: str = "auto"
    max_length: int | None = None
    chat_template: str | None = None
    copy: bool = False
    sharding: str = "none"
    task: str | None = None

    def __post_init__(self) -> None:
        if self.sharding not in SHARDINGS:
            raise RequestError(f"unknown sharding '{self.sharding}'{did_you_mean(self.sharding, SHARDINGS)}")
