"""Who takes part in a gate, and by how much: logits or vectors that are learned, and the task of what is read now.

A `Mixture` belongs to a model; its gate layers ask it (`rankwise.adapters.gate`). What it answers is a choice: one task
for everything, or shares of the tasks, which may differ by row or by token.

Legend: T tasks, G groups of layers with logits of their own, E entries of a task's vector, b rows or rows and tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rankwise.adapters.gate_config import HARD, INFERRED, TOP_K, EmbeddingConfig, GateConfig
from rankwise.errors import RequestError, did_you_mean


@dataclass
class Routing:
    """The task of what goes through the model now. Copies of a model start without one."""

    given: int | Tensor | None = None
    """One task for all, ids of rows [B] or of tokens [B, T], or shares of the tasks, [T], as floats."""
    inferred: Int64[Tensor, " B"] | None = None
    """What the classifier has found for each row, while nothing is given."""
    spread: tuple[Tensor, Tensor] | None = None
    """Ids, and the same as shares: each layer asks for them anew."""

    def __deepcopy__(self, memo: dict[int, object]) -> Routing:
        return Routing()

    def __reduce__(self) -> tuple[type[Routing], tuple[()]]:
        return Routing, ()


@final
class Mixture(nn.Module):
    """Shares of the tasks' adapters, or the tasks' vectors.

    Args:
        tasks: their names, in the order of logits and ids.
        gate: for adapters of several tasks; or else
        embedding: for one shared adapter that vectors scale.
        num_groups: G, for learned gates.
        num_entries: E, for embeddings.
    """

    router_weight: Tensor | None
    router_bias: Tensor | None

    def __init__(
        self,
        tasks: Sequence[str],
        gate: GateConfig | None = None,
        embedding: EmbeddingConfig | None = None,
        num_groups: int = 1,
        num_entries: int = 0,
    ) -> None:
        super().__init__()
        assert (gate is None) != (embedding is None)
        self.tasks = tuple(tasks)
        self.gate = gate
        self.embedding = embedding
        self.groups: tuple[str, ...] = ()
        """Names of the groups, for learned gates: see `rankwise.attach.gates.group_of`."""
        self.routing = Routing()
        has_logits = gate is not None and gate.mode not in (HARD, INFERRED)
        self.logits = nn.Parameter(torch.zeros(num_groups, len(tasks))) if has_logits else None
        vectors = [nn.Parameter(torch.ones(num_entries)) for _ in tasks] if embedding is not None else []
        self.vectors = nn.ParameterList(vectors)
        """By task, in their order; ones at the start: then the shared adapter is as it is."""
        self.router_report: dict[str, object] | None = None
        """What is known of the classifier: rows, accuracy."""
        self.register_buffer("router_weight", None)
        self.register_buffer("router_bias", None)

    @property
    def is_static(self) -> bool:
        """Whether the shares are the same for all inputs."""
        return self.logits is not None

    @property
    def infers(self) -> bool:
        """Whether a task can be found for rows that come without one."""
        return self.gate is not None and self.gate.mode == INFERRED and self.router_weight is not None

    def number(self, task: str) -> int:
        """The task's place. Raises: RequestError for an unknown one."""
        if task not in self.tasks:
            raise RequestError(f"unknown task '{task}'{did_you_mean(task, self.tasks)}")
        return self.tasks.index(task)

    def chosen(self, group: int) -> int | Float[Tensor, "*b T"]:
        """One task, or the shares of all: [T], or for each row or token.

        Raises: RequestError when tasks differ by input and none is given.
        """
        given = self.routing.given
        if isinstance(given, int):
            return given
        if given is None and self.logits is not None:
            return self.shares(group)
        if given is None:
            given = self.routing.inferred
        if given is None:
            raise RequestError(self._missing())
        if given.is_floating_point():
            return given
        spread = self.routing.spread
        if spread is None or spread[0] is not given:
            spread = self.routing.spread = given, F.one_hot(given, len(self.tasks)).float()
        return spread[1]

    def rows(self) -> Int64[Tensor, " B"] | None:
        """The task of each row, where rows have one each."""
        given = self.routing.inferred if self.routing.given is None and self.logits is None else self.routing.given
        if not isinstance(given, Tensor) or given.dim() != 1 or given.is_floating_point():
            return None
        return given

    def shares(self, group: int) -> Float[Tensor, " T"]:
        """What the learned gate gives each task's adapter in layers of this group; they sum to 1."""
        assert self.logits is not None and self.gate is not None
        temperature = 1.0 if self.gate.temperature is None else self.gate.temperature
        shares = torch.softmax(self.logits[group] / temperature, dim=-1)
        if self.gate.mode != TOP_K or self.gate.k is None:
            return shares
        values, places = shares.topk(self.gate.k)
        return torch.zeros_like(shares).scatter(0, places, values / values.sum())

    def scaling(self, chosen: int | Tensor, first: int, last: int) -> Float[Tensor, "*b r"]:
        """The entries `first` to `last` of the chosen vectors (of shares: their sum)."""
        if isinstance(chosen, int):
            return self.vectors[chosen][first:last]
        every = torch.stack([vector[first:last] for vector in self.vectors])
        return chosen.to(every) @ every

    def _missing(self) -> str:
        known = ", ".join(self.tasks)
        if self.gate is not None and self.gate.mode == INFERRED:
            return (
                "no task is given and the gate has no classifier yet to find it; give one with rankwise.on_task(model, "
                f"...), of {known}"
            )
        kind = "task embedding" if self.embedding is not None else "hard gate"
        return (
            f"no task is given, and a {kind} needs one of {known}: call the model inside `with rankwise.on_task(model, "
            "...)` (its backward pass too, where activations are computed again), or give --task"
        )

    def one(self, task: str | int | Tensor | Sequence[str] | Mapping[str, float]) -> int | Tensor:
        """What `Routing.given` holds for a name, names of rows, numbers of rows or tokens, or shares by name.

        Raises: RequestError for an unknown task, a number that is none, or shares that can't be.
        """
        if isinstance(task, str):
            return self.number(task)
        if isinstance(task, Mapping):
            return self._shares_by_name(task)
        if isinstance(task, Sequence):
            if not task:
                raise RequestError("the list of tasks is empty; give one for each row")
            task = torch.tensor([self.number(name) for name in task])
        numbers = torch.as_tensor(task)
        if numbers.is_floating_point() or numbers.dtype == torch.bool:
            raise RequestError("tasks are names or whole numbers; shares of tasks go by name, as {'task': 0.5, ...}")
        if numbers.numel() and not 0 <= (least := int(numbers.min())) <= (most := int(numbers.max())) < len(self.tasks):
            raise RequestError(
                f"task number {least if least < 0 else most} can't be: there are {len(self.tasks)}, from 0 "
                f"({', '.join(self.tasks)})"
            )
        return int(numbers) if numbers.ndim == 0 else numbers.long().clone()  # the caller may write to theirs

    def _shares_by_name(self, shares: Mapping[str, float]) -> Float[Tensor, " T"]:
        found = torch.zeros(len(self.tasks))
        for name, share in shares.items():
            found[self.number(name)] = share
        if not bool(torch.isfinite(found).all()) or not bool(found.any()):
            raise RequestError("shares of tasks must be finite, and one of them not 0")
        return found

    @contextlib.contextmanager
    def routed(self, given: int | Tensor | None) -> Generator[None]:
        """In the block, this is what is read."""
        before, self.routing.given = self.routing.given, given
        try:
            yield
        finally:
            self.routing.given = before
