"""A watch on the loss: a run that diverges stops, with the reason, instead of burning hours."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.errors import WorkError

SMOOTHING = 0.9
FACTOR = 2.0
MARGIN = 1.0
PATIENCE = 20


@dataclass
class LossWatch:
    """Diverged: for 20 steps on end the loss was above 2 * best + 1 nats, best being the lowest smoothed loss so far.

    The rule is deliberately wide: a hard batch or a new topic doubles a loss for a step, a broken run stays there. The
    one nat keeps losses near 0 (a memorised data set) from counting as best.
    """

    smoothed: float | None = None
    best: float | None = None
    bad_steps: int = 0

    def check(self, step: int, loss: float) -> None:
        """Takes the loss of one step in.

        Raises: WorkError when the run has diverged.
        """
        if self.smoothed is None or self.best is None:
            self.smoothed = self.best = loss
            return
        bound = FACTOR * self.best + MARGIN
        self.bad_steps = self.bad_steps + 1 if loss > bound else 0
        self.smoothed = SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
        self.best = min(self.best, self.smoothed)
        if self.bad_steps >= PATIENCE:
            raise WorkError(
                f"step {step}: the loss has diverged: above {bound:.3g} for {PATIENCE} steps (now {loss:.3g}, "
                f"best {self.best:.3g}); lower train.lr or lengthen train.warmup, and start again"
            )
