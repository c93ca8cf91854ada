"""Heads of several tasks on one linear layer: each task's adapter has trained its own, and shares mix what they give.

y = sum_i c_i (W_i x + b_i). The shares of a gate sum to 1, so that a fixed mixture is one head again, sum_i c_i W_i;
the base's own head takes no part. Heads and what they give are fp32, as a single adapter's (`rankwise.attach.wide`).

Legend: o classes, n inputs, b rows, or rows and tokens, M heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.gate import ALWAYS
from rankwise.adapters.mixture import Mixture
from rankwise.errors import RequestError


@dataclass(frozen=True)
class Head:
    """One task's weights. `task`: its number, or ALWAYS: then it is the only head."""

    name: str
    task: int
    weight: Float[Tensor, "o n"]
    bias: Float[Tensor, " o"] | None


@final
class HeadGate(AdapterLayer):
    """The linear layer `base` of a head, in place of which `heads` answer."""

    def __init__(self, base: nn.Module, name: str, heads: Sequence[Head], mixture: Mixture, group: int = 0) -> None:
        super().__init__(base)
        if type(base) is not nn.Linear:
            raise RequestError(
                f"'{name}' is trained whole by the adapters and is a {type(base).__name__}: heads of several tasks can "
                "be put together only where they are plain linear layers"
            )
        self.names = tuple(head.name for head in heads)
        self.owners = tuple(head.task for head in heads)
        assert ALWAYS not in self.owners or len(heads) == 1
        self.group = group
        self._name = name
        self._mixture = (mixture,)  # in a tuple, it is no submodule: it belongs to the model
        self.weights = nn.ParameterList([nn.Parameter(head.weight.float()) for head in heads])
        biases = [head.bias for head in heads if head.bias is not None]
        self.biases = nn.ParameterList([nn.Parameter(bias.float()) for bias in biases])

    def forward(self, x: Tensor) -> Tensor:
        """The heads' answers in their shares, or the base's while not active. Raises: RequestError, as `GateLayer`."""
        if not self.active:
            return self.base(x)
        x = x.to(self.weights[0].dtype)
        shares = self._shares()
        if isinstance(shares, int):
            return F.linear(x, self.weights[shares], self.biases[shares] if len(self.biases) else None)
        if shares.dim() == 1:
            return F.linear(x, *self._mixed(shares))
        answers = torch.stack([self._one(i, x) for i in range(len(self.weights))], dim=-1)
        if shares.dim() == 3 and shares.shape[:2] != x.shape[:2]:
            raise RequestError(f"tasks of tokens don't fit what '{self._name}' reads; give one task for each row")
        if shares.dim() == 2:
            if x.shape[0] % shares.shape[0]:
                raise RequestError(
                    f"{shares.shape[0]} rows have a task where '{self._name}' reads {x.shape[0]}; give one task for "
                    "each row"
                )
            shares = shares.repeat_interleave(x.shape[0] // shares.shape[0], dim=0)
            shares = shares.view(x.shape[0], *[1] * (x.dim() - 2), -1)
        return (answers * shares.unsqueeze(-2)).sum(-1)

    def _one(self, place: int, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[place], self.biases[place] if len(self.biases) else None)

    def _shares(self) -> int | Float[Tensor, "*b M"]:
        """The place of one head, or the shares of all."""
        if self.owners == (ALWAYS,):
            return 0
        chosen = self._mixture[0].chosen(self.group)
        if isinstance(chosen, int):
            if chosen not in self.owners:
                raise RequestError(f"task '{self._mixture[0].tasks[chosen]}' has no head of its own in '{self._name}'")
            return self.owners.index(chosen)
        return chosen[..., list(self.owners)].to(self.weights[0].device)

    def _mixed(self, shares: Float[Tensor, " M"]) -> tuple[Tensor, Tensor | None]:
        weight = torch.einsum("m,mon->on", shares, torch.stack(list(self.weights)))
        bias = torch.einsum("m,mo->o", shares, torch.stack(list(self.biases))) if len(self.biases) else None
        return weight, bias

    def head(self) -> tuple[Float[Tensor, "o n"], Float[Tensor, " o"] | None]:
        """Weight and bias of the one head that these are, of the task that is given or of a learned gate.

        Raises: RequestError when tasks differ by input, or none is given.
        """
        shares = self._shares()
        if isinstance(shares, int):
            return self.weights[shares], self.biases[shares] if len(self.biases) else None
        if shares.dim() > 1:
            raise RequestError("tasks differ by row, so there is no one head; choose one task")
        return self._mixed(shares)

    @override
    def delta_weight(self) -> Float[Tensor, "o n"]:
        return self.head()[0] - self.base_weight().float()

    @override
    def merged_bias(self) -> Float[Tensor, " o"] | None:
        return self.head()[1]

    @override
    def peft_parameters(self) -> dict[str, nn.Parameter]:
        """Those of each head behind its adapter's name: `movies.weight`."""
        found = {f"{name}.weight": weight for name, weight in zip(self.names, self.weights, strict=True)}
        if len(self.biases):
            found |= {f"{name}.bias": bias for name, bias in zip(self.names, self.biases, strict=True)}
        return found
