"""A gate folded into one plain LoRA: exact where the shares are the same for all inputs, or cut to a lower rank.

sum_i s_i c_i B_i A_i is B A with the adapters' rows side by side in A, and their columns times s_i c_i in B: a LoRA of
rank sum r_i and scale 1. A task's vector does the same to one adapter: B diag(s e_t) A. Adapters without a share are
left out. A lower rank is the best approximation of the change (Eckart and Young 1936); the base is needed for nothing.

Legend: o outputs, n inputs, r_i rank of adapter i, R of the folded one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.adapters.factored import rank_for_energy, relative_error, singular_values, truncated
from rankwise.adapters.gate_config import GLOBAL, INFERRED, SHARED
from rankwise.adapters.mixture import Mixture
from rankwise.attach.gate_folder import GateFolder, check_tables
from rankwise.attach.gates import group_of
from rankwise.errors import RequestError


@dataclass(frozen=True)
class Share:
    """One adapter's factors in a layer, in the layer's own shapes, and the coefficient of each of its columns."""

    A: Float[Tensor, "r ..."]
    B: Float[Tensor, "o r ..."]
    coefficients: Float[Tensor, " r"]


@dataclass(frozen=True)
class FoldedLayer:
    """One layer, with scale 1. `lost` and `whole`: squared Frobenius norms of what was cut off and of all there was."""

    A: Float[Tensor, "R ..."]
    B: Float[Tensor, "o R ..."]
    before: int
    lost: float
    whole: float

    @property
    def rank(self) -> int:
        """Of the layer as it is now."""
        return self.A.shape[0]

    @property
    def error(self) -> float:
        """Relative Frobenius error of the layer's change."""
        return relative_error(self.lost, self.whole)


def folded_layer(shares: Sequence[Share], rank: int | None = None, energy: float | None = None) -> FoldedLayer:
    """The adapters' sum as one, in fp32: exact, of at most `rank`, or of one that keeps `energy` of its square."""
    kept = [share for share in shares if bool(share.coefficients.any())] or [shares[0]]
    A = torch.cat([share.A.double() for share in kept])
    columns = [share.coefficients.double().view(1, -1, *[1] * (share.B.dim() - 2)) for share in kept]
    B = torch.cat([share.B.double() * column for share, column in zip(kept, columns, strict=True)], dim=1)
    before = A.shape[0]
    flat_A, flat_B = A.flatten(1), B.flatten(1)
    if energy is not None:
        rank = rank_for_energy(singular_values(flat_A, flat_B), energy)
    if rank is None or rank >= before:
        whole = float(singular_values(flat_A, flat_B).square().sum())
        return FoldedLayer(A.float(), B.float(), before, 0.0, whole)
    cut = truncated(flat_A, flat_B, rank)
    A, B = cut.A.reshape(rank, *A.shape[1:]), cut.B.reshape(B.shape[0], rank, *B.shape[2:])
    return FoldedLayer(A.float().contiguous(), B.float().contiguous(), before, cut.lost, cut.whole)


@dataclass(frozen=True)
class Shares:
    """What each adapter of a gate's folder counts in each layer, when the task is `task` (None: by the learned gate).

    Args:
        spec: the folder's `tasks.json`.
        mixture: with the folder's logits, on the CPU; `given` in its routing, where a task or shares are chosen.
        groups: names of the mixture's groups, in order.
        vector: by layer, the chosen task's vector; empty for gates.
    """

    spec: GateFolder
    mixture: Mixture | None
    vector: Mapping[str, Tensor]

    def of(self, adapter: str, layer: str, rank: int) -> Float[Tensor, " r"]:
        """The coefficients of the columns of `adapter` in `layer`, without its scale."""
        if self.mixture is None:
            return self.vector[layer if layer in self.vector else ""]
        return torch.full((rank,), self.whole_of(adapter, layer))

    def whole_of(self, adapter: str, layer: str) -> float:
        """The share of `adapter` in `layer`, as a number."""
        task = self.spec.adapters[adapter]
        if task is None or self.mixture is None:
            return 1.0
        gate = self.spec.gate
        assert gate is not None
        place = 0
        if self.mixture.groups:
            group = group_of(layer, gate.per or GLOBAL)
            if group not in self.mixture.groups:
                raise RequestError(f"the gate has no logits for '{group}', where adapter '{adapter}' has a layer")
            place = self.mixture.groups.index(group)
        chosen = self.mixture.chosen(place)
        number = self.mixture.number(task)
        return float(chosen == number) if isinstance(chosen, int) else float(chosen[number])


def shares_of(
    spec: GateFolder,
    tables: Mapping[str, Tensor],
    where: str,
    task: str | Mapping[str, float] | None,
) -> Shares:
    """What counts by how much: of `task`, of shares by task, or None: of the learned gate.

    Raises: RequestError for an unknown task; without one, where no mixture is the same for all inputs; for tables that
        don't fit the folder.
    """
    if spec.embedding is not None:
        return Shares(spec, None, _vector(spec, tables, where, task))
    assert spec.gate is not None
    groups = [name.removeprefix("logits/") for name in tables if name.startswith("logits/")]
    mixture = Mixture(spec.tasks, spec.gate, num_groups=max(len(groups), 1))
    if mixture.logits is not None:
        wanted = {f"logits/{name}": (len(spec.tasks),) for name in groups}
        check_tables(where, wanted or {f"logits/{GLOBAL}": (len(spec.tasks),)}, tables)
        mixture.groups = tuple(groups)
        mixture.logits.data = torch.stack([tables[f"logits/{name}"].float() for name in groups])
    if task is not None:
        mixture.routing.given = mixture.one(task)
    elif not mixture.is_static:
        raise RequestError(_refusal(spec, where))
    return Shares(spec, mixture.requires_grad_(False), {})


def _refusal(spec: GateFolder, where: str) -> str:
    known = ", ".join(spec.tasks)
    if spec.gate is not None and spec.gate.mode == INFERRED:
        return (
            f"'{where}' is a gate that infers the task from its input, so it is no one adapter: fold each task by "
            f"--task (of {known}), and choose among them where they are used"
        )
    kind = "a hard gate" if spec.embedding is None else "a set of task embeddings"
    return f"'{where}' is {kind}, one adapter for each task: choose one by --task (of {known})"


def _vector(
    spec: GateFolder, tables: Mapping[str, Tensor], where: str, task: str | Mapping[str, float] | None
) -> dict[str, Tensor]:
    """The chosen task's vector by layer; by "" where all layers share one."""
    assert spec.embedding is not None
    if task is None:
        raise RequestError(_refusal(spec, where))
    mixture = Mixture(spec.tasks, embedding=spec.embedding)
    chosen = mixture.one(task)
    weights = (
        {spec.tasks[chosen]: 1.0} if isinstance(chosen, int) else dict(zip(spec.tasks, chosen.tolist(), strict=True))
    )
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        start = f"vectors/{name}"
        own = {
            key[len(start) :].removeprefix("/"): t
            for key, t in tables.items()
            if key == start or key.startswith(f"{start}/")
        }
        if not own or (spec.embedding.per == SHARED) != (set(own) == {""}):
            raise RequestError(f"'{where}' lacks the vector of task '{name}', or it is not per {spec.embedding.per}")
        for layer, vector in own.items():
            found[layer] = found.get(layer, torch.zeros_like(vector)) + weight * vector
    return found
