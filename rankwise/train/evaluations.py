"""What the evaluations of a run have shown so far: when to stop early, and which checkpoint is the best one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Evaluations:
    """Part of a run's progress, so that a resumed run stops where the straight one does, and keeps the same checkpoint.

    Patience counts against `reference`, the loss that last counted as lower, and not against the lowest one: small
    gains that add up to `min_delta` are progress.
    """

    reference: float | None = None
    num_stale: int = 0
    """Evaluations since then."""
    best: float | None = None
    """The loss of the checkpoint that is kept as the best; None: none is."""
    best_step: int | None = None

    def take(self, step: int, loss: float, min_delta: float, keep_best: bool) -> None:
        """Takes the validation loss after `step` in."""
        if self.reference is None or loss < self.reference - min_delta:
            self.reference, self.num_stale = loss, 0
        else:
            self.num_stale += 1
        if keep_best and (self.best is None or loss < self.best):
            self.best, self.best_step = loss, step

    def are_stale(self, patience: int | None) -> bool:
        """Whether `patience` evaluations in turn (None: however many) have brought nothing."""
        return patience is not None and self.num_stale >= patience

    def forget_best(self) -> None:
        """No checkpoint is the best one any more."""
        self.best = self.best_step = None
