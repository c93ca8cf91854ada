"""Direct preference optimisation: the objective `dpo` (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    loss = -log sigmoid(beta ((log p(y_w | x) - log r(y_w | x)) - (log p(y_l | x) - log r(y_l | x))))

x the prompt, y_w and y_l the chosen and the rejected answer, p the model, r the reference. A log-probability is the sum
over the answer's tokens; beta (log p - log r) is the implicit reward of an answer.

The reference is no second model. It is this one with the adapter off, or, for a run that starts from an adapter, with
the factors that it started from: they are kept once, in fp32, and put in place of the factors for the reference's
forward pass, which runs first, without gradients and without dropout. So the peak is that of one model, plus the
adapter twice while the factors are exchanged. Each step costs one forward more, on the same micro batch: nothing has to
be computed before the run, rows may be streamed, and a resumed run sees the same numbers.

Legend: P pairs of a micro batch, 2P sequences. Log-probabilities and rewards are in nats, summed in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.attach.inject import adapter_parameters
from rankwise.data.preference_batch import PreferenceBatch
from rankwise.errors import RequestError
from rankwise.models.loss import example_losses
from rankwise.models.probing import undisturbed
from rankwise.train.objective import Meter

Reference = Callable[[PreTrainedModel], AbstractContextManager[None]]
"""Makes the model its own reference, inside of a block."""

REWARD_MARGIN, REWARD_ACCURACY = "reward_margin", "reward_accuracy"
REWARD_CHOSEN, REWARD_REJECTED = "reward_chosen", "reward_rejected"
FIGURES = (REWARD_MARGIN, REWARD_ACCURACY, REWARD_CHOSEN, REWARD_REJECTED)


class StartingAdapter:
    """The reference of a run that goes on from an adapter: the factors as they are now."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._start = _copies(model)

    @contextlib.contextmanager
    def in_place(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside the block the model has the starting factors.

        Raises: RequestError when its ranks have changed: then they don't fit.
        """
        parameters = adapter_parameters(model)
        fits = {name: tensor.shape for name, tensor in self._start.items()}
        if {name: parameter.shape for name, parameter in parameters.items()} != fits:
            raise RequestError(
                "ranks have changed since the run began, so the adapter that it started from can't be the reference; "
                "train with the ranks fixed, or start from a new adapter"
            )
        now = _copies(model)
        _put(parameters, self._start)
        try:
            yield
        finally:
            _put(parameters, now)


def _copies(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}


@torch.no_grad()
def _put(parameters: dict[str, torch.nn.Parameter], values: dict[str, Tensor]) -> None:
    """In place, so that what was computed from a parameter is known to be out of date."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


@dataclass(frozen=True)
class Preference:
    """The losses of pairs.

    `beta`: how strongly the model is held to the reference; `meter` takes means over pairs of the rewards of both
    answers, of their difference, and of whether the chosen answer's is the larger one.
    """

    beta: float
    reference: Reference
    meter: Meter

    def losses(self, model: PreTrainedModel, batch: PreferenceBatch) -> Float[Tensor, " P"]:
        """One loss for each pair, float32."""
        with undisturbed(model), self.reference(model):
            expected = log_probabilities(model, batch)
        rewards = self.beta * (log_probabilities(model, batch) - expected)
        margins = rewards[:, 0] - rewards[:, 1]
        self.meter.add(REWARD_MARGIN, margins)
        self.meter.add(REWARD_ACCURACY, margins > 0)
        self.meter.add(REWARD_CHOSEN, rewards[:, 0])
        self.meter.add(REWARD_REJECTED, rewards[:, 1])
        return -F.logsigmoid(margins).float()


def log_probabilities(model: PreTrainedModel, batch: PreferenceBatch) -> Float[Tensor, "P 2"]:
    """Of the chosen and of the rejected answer of each pair: the sum over its tokens, in float64."""
    sums, _ = example_losses(model, batch.sequences)
    return -sums.view(-1, 2)
