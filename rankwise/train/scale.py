"""The factor that the loss is multiplied with before the backward pass, so that small gradients survive fp16.

Micikevicius et al. 2018, "Mixed Precision Training" (arXiv 1710.03740, section 3.2): numbers below 6e-8 are zero in
fp16, and gradients of a mean over many tokens are smaller than that. Multiplied by a power of two they are not; the
same power is divided out of them, exactly, once they have reached the fp32 parameters. When a gradient overflows
(65,504 and above is infinite) the step is skipped and the factor halved; after many good steps it doubles.

Adapters are fp32, so what is divided is never an fp16 gradient. For fp32 and bf16 the factor is 1, and stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from rankwise.errors import WorkError

INITIAL = 2.0**16
GROWTH_INTERVAL = 2000
"""Good steps on end after which the factor doubles (torch's GradScaler has the same figures)."""


@dataclass
class LossScale:
    """The factor now, and what it has come through; a checkpoint holds it whole."""

    factor: float = 1.0
    is_dynamic: bool = False
    good_steps: int = 0
    """Since the factor last changed."""
    skipped_steps: int = 0
    """In the whole run."""

    @classmethod
    def of(cls, precision: str) -> LossScale:
        """That of a new run in `fp32`, `bf16` or `fp16`."""
        return cls(INITIAL, is_dynamic=True) if precision == "fp16" else cls()

    def unscale(self, parameters: Sequence[nn.Parameter]) -> None:
        """Divides the factor out of the parameters' gradients, in place."""
        if self.factor == 1.0:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1.0 / self.factor)

    def update(self, step: int, is_finite: bool) -> None:
        """Takes in whether the gradients of `step` were finite; if not, the step must be skipped.

        Raises: WorkError when they overflow without any factor.
        """
        if not self.is_dynamic:
            return
        self.good_steps = self.good_steps + 1 if is_finite else 0
        if not is_finite:
            self.skipped_steps += 1
            if self.factor <= 1.0:
                raise WorkError(
                    f"step {step}: the gradients overflow fp16 even unscaled, {self.skipped_steps} steps were skipped; "
                    "set train.precision to bf16 or fp32"
                )
            self.factor /= 2.0
        elif self.good_steps == GROWTH_INTERVAL:
            self.factor, self.good_steps = self.factor * 2.0, 0

    def figures(self) -> dict[str, float]:
        """For the log: nothing where the factor is always 1."""
        return {"loss_scale": self.factor, "skipped_steps": self.skipped_steps} if self.is_dynamic else {}
