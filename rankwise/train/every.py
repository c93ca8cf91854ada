"""When something happens in a run: every so many steps or epochs, ten times, or never."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from rankwise.errors import RequestError

AUTO = "auto"
AUTO_EVENTS = 10
"""An "every" setting of `auto` gives this many events in a run, the last step included."""

_EPOCHS = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*epochs?\s*")


@dataclass(frozen=True)
class Every:
    """A period of `steps`, or else of `epochs`; both 0 mean never."""

    steps: int = 0
    epochs: float = 0.0

    @classmethod
    def parse(cls, value: int | str | None, name: str, num_steps: int) -> Every:
        """`50`, `"50"`, `"2 epochs"`, `auto`, or null and 0 for never; `name` is the setting, for messages.

        Raises: RequestError for anything else.
        """
        if value is None:
            return cls()
        if value == AUTO:
            return cls(steps=math.ceil(num_steps / AUTO_EVENTS))
        text = str(value)
        if re.fullmatch(r"\s*\d+\s*", text):
            return cls(steps=int(text))
        match = _EPOCHS.fullmatch(text)
        if match is None or float(match[1]) == 0:
            raise RequestError(f'{name} must be a number of steps, "2 epochs", auto, or null for never, not {value!r}')
        return cls(epochs=float(match[1]))

    @property
    def is_never(self) -> bool:
        """Whether the event does not happen."""
        return self.steps == 0 and self.epochs == 0

    def due(self, step: int, rows_per_step: int, rows_per_epoch: int) -> bool:
        """Whether the event happens after `step` (counted from 1): a multiple of the period is reached in it."""
        if self.steps:
            return step % self.steps == 0
        if self.epochs:
            period = Fraction(str(self.epochs)) * rows_per_epoch  # 0.1 as it was written: as a float it is a bit more
            return step * rows_per_step // period > (step - 1) * rows_per_step // period
        return False
