"""Examples that know which task they are of, where several tasks lie one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rankwise.data.example import Example


class TaskExamples(Sequence[Example]):
    """Examples with their `task` filled in. Nothing is read before it is asked for.

    Args:
        examples: of all tasks, one task after another.
        names: the tasks.
        sizes: how many examples each has; together all of them.
    """

    def __init__(self, examples: Sequence[Example], names: Sequence[str], sizes: Sequence[int]) -> None:
        assert len(names) == len(sizes) and sum(sizes) == len(examples), (names, sizes, len(examples))
        self._examples, self.names = examples, tuple(names)
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, place: Any) -> Any:
        """The example at that place; a slice is a list."""
        if isinstance(place, slice):
            return [self[row] for row in range(len(self))[place]]
        row = range(len(self))[place]
        task = int(np.searchsorted(self._ends, row, side="right"))
        return replace(self._examples[row], task=self.names[task])
