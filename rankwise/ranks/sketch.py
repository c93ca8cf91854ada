"""The gradient by each adapted layer's weight, seen through a random sketch while a step is taken; never formed.

G = sum over tokens of g x^T (g the gradient of the layer's output, x its input) is o x n. What is kept is G Omega, with
a Gaussian Omega of k columns: o x k, linear in G, so that it adds up over micro batches and processes; and the mean of
|G Omega|^2 / k is |G|^2 (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, section 10). With x (I - P_A) Omega beside
x Omega, two products of k columns a layer, the energy outside of the rows of A is known too, and that outside of the
columns of B follows at the end.

Legend: o outputs, n inputs, r rank, k columns of the sketch, N tokens.
"""

# torch.linalg has no type stubs.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rankwise import distributed
from rankwise.adapters.low_rank import LowRankLayer
from rankwise.ranks.growth import ranked_layers

COLUMNS = 32
"""Of a sketch: a share of energy is then within about a fifth of the true one."""
RELATIVE_ZERO = 1e-6
"""Singular values below this share of the largest span nothing."""


class GradientSketch:
    """Listens to a model's adapted layers from when it is made until `outside` is asked for.

    Args:
        model: the attached model; the next steps' forward and backward passes are listened to.
        seed: of the random columns: the same on every process.
    """

    def __init__(self, model: nn.Module, seed: str) -> None:
        self._layers = ranked_layers(model)
        self._down = {name: _columns(layer, f"{seed}:{name}") for name, layer in self._layers.items()}
        self._sums = {
            name: torch.zeros(layer.lora_B.shape[0], 2 * COLUMNS, device=layer.lora_B.device)
            for name, layer in self._layers.items()
        }
        self._handles: list[RemovableHandle] = [
            layer.register_forward_hook(self._listener(name)) for name, layer in self._layers.items()
        ]

    def outside(self) -> dict[str, float]:
        """The measure `gradient` of every layer (see `rankwise.ranks.growth`); 0 where there was no gradient.

        All processes must call it. Listening ends.
        """
        for handle in self._handles:
            handle.remove()
        distributed.all_reduce_sum(list(self._sums.values()))
        return {name: _share_outside(layer, self._sums[name]) for name, layer in self._layers.items()}

    def _listener(self, name: str) -> Any:
        layer, columns, total = self._layers[name], self._down[name], self._sums[name]

        def listen(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            with torch.no_grad():
                seen = layer.kind.down(layer.base, args[0], columns.to(_dtype(layer, args[0])))

            def add(grad: Tensor) -> None:
                total.addmm_(_tokens(layer, grad).T, _tokens(layer, seen))

            output.register_hook(add)

        return listen


def _dtype(layer: LowRankLayer, x: Tensor) -> torch.dtype:
    return x.dtype if layer.kind.drops_input else layer.lora_A.dtype


def _tokens(layer: LowRankLayer, values: Tensor) -> Float[Tensor, "N c"]:
    """Channels last, everything else in one: of a convolution they come second."""
    is_convolution = layer.lora_A.dim() > 2
    last = values.movedim(1, -1) if is_convolution else values
    return last.reshape(-1, last.shape[-1]).float()


def _columns(layer: LowRankLayer, seed: str) -> Tensor:
    """Omega and (I - P_A) Omega as rows, in the shape of a factor A of rank 2 k."""
    A = layer.lora_A.detach()
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    omega = torch.randn(A[0].numel(), COLUMNS, generator=generator).to(A)
    basis = _basis(A.flatten(1).T)
    rest = omega - basis @ (basis.T @ omega)
    return torch.cat([omega, rest], dim=1).T.reshape(2 * COLUMNS, *A.shape[1:]).contiguous()


def _share_outside(layer: LowRankLayer, total: Float[Tensor, "o k"]) -> float:
    whole, rest = total.double().split(COLUMNS, dim=1)
    basis = _basis(layer.lora_B.detach().flatten(1).double())
    energy = float(whole.square().sum())
    share = float((rest - basis @ (basis.T @ rest)).square().sum()) / energy if energy else 0.0
    return min(share, 1.0) if math.isfinite(share) else 0.0  # what overflowed says nothing


def _basis(matrix: Float[Tensor, "m r"]) -> Float[Tensor, "m c"]:
    """Orthonormal columns that span those of `matrix`; none where it is zero."""
    U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
    is_used = S.gt(RELATIVE_ZERO * S.max())
    return U[:, is_used]
