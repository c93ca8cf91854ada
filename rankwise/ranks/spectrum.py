"""What data say about a layer before training: the leading spectrum of its gradient and of its input.

The gradient G = sum of d x^T over tokens (d the gradient of the layer's output, x its input) and the second moment
M = sum of x x^T are looked at through sketches of some columns: no dense gradient is ever formed, of any layer. There
are two passes over the same rows (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 5.1): the first takes
Y = G O for random O and finds its range Q, the second takes Q^T G, which has G's leading singular values and vectors,
exactly where the width is the whole, and else up to what lies beyond it. Likewise M O, and then Q^T M Q. Tokens that
the loss does not depend on (padding) count for neither.

Legend: o outputs, n inputs of a layer, t tokens, w width, k directions kept.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.adapters.layers import EmbeddingKind, LinearKind
from rankwise.adapters.low_rank import LowRankLayer
from rankwise.adapters.starts import Directions
from rankwise.adapters.svd import OVERSAMPLING
from rankwise.errors import RequestError

PASSES = 2


@dataclass(frozen=True)
class Spectrum:
    """Of one layer: singular values, largest first, and directions.

    `energy`: the sum of all squared singular values of the inputs, those beyond the kept ones too.
    """

    gradient: Float[Tensor, " k"]
    activation: Float[Tensor, " j"]
    energy: float
    directions: Directions

    def gains(self, measure: str, gradients: float) -> list[float]:
        """What each further rank adds, largest first; `gradients`: the sum of all layers' squared singular values.

        `gradient`: its share of all gradients: with a small step the loss falls by as much. `activation`: the share of
        this layer's input that it explains (EVA: Paischer et al. 2024, arXiv 2410.07170). `product`: both.
        """
        of_gradient = self.gradient.double().square() / (gradients or 1.0)
        of_input = self.activation.double().square() / (self.energy or 1.0)
        if measure == "gradient":
            return of_gradient.tolist()
        if measure == "activation":
            return of_input.tolist()
        most = min(len(of_gradient), len(of_input))
        return (of_gradient[:most] * of_input[:most]).tolist()


class _Sketch:
    """What is summed up for one layer."""

    def __init__(self, layer: LowRankLayer, width: int, generator: torch.Generator) -> None:
        num_outputs, num_inputs = layer.lora_B.shape[0], layer.lora_A.shape[1]
        device = layer.lora_A.device
        self.of_gradient = torch.empty(num_inputs, min(width, num_inputs, num_outputs)).normal_(generator=generator)
        self.of_input = torch.empty(num_inputs, min(width, num_inputs)).normal_(generator=generator)
        self.of_gradient, self.of_input = self.of_gradient.to(device), self.of_input.to(device)
        self.Y = torch.zeros(num_outputs, self.of_gradient.shape[1], device=device)
        self.V = torch.zeros(num_inputs, self.of_input.shape[1], device=device)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)
        self.is_second = False

    def add(self, x: Tensor, d: Tensor) -> None:
        """Adds tokens: the layer's inputs and the gradients of its outputs."""
        x, d = x.detach().flatten(0, -2).float(), d.detach().flatten(0, -2).float()
        counts = (d != 0).any(1)
        x = x * counts[:, None]
        if not self.is_second:
            self.Y += d.T @ (x @ self.of_gradient)
            self.V += x.T @ (x @ self.of_input)
            return
        self.Y += (d @ self.Q).T @ x  # Q^T G, [w, n]
        seen = x @ self.R
        self.V += seen.T @ seen  # R^T M R, [w, w]
        self.energy += x.double().square().sum()

    def turn(self) -> None:
        """From the first pass to the second."""
        self.Q, _ = torch.linalg.qr(self.Y)
        self.R, _ = torch.linalg.qr(self.V)
        self.Y = torch.zeros(self.Q.shape[1], self.of_gradient.shape[0], device=self.Y.device)
        self.V = torch.zeros(self.R.shape[1], self.R.shape[1], device=self.V.device)
        self.is_second = True

    def result(self, most: int) -> Spectrum:
        """The spectrum after the second pass, of at most so many directions."""
        U, S, Vh = torch.linalg.svd(self.Y, full_matrices=False)
        values, vectors = torch.linalg.eigh(self.V.double())
        values, vectors = values.flip(0)[:most].clamp(min=0), vectors.flip(1)[:, :most].float()
        directions = Directions((self.R @ vectors).T.cpu(), (self.Q @ U[:, :most]).cpu(), Vh[:most].cpu())
        return Spectrum(S[:most].cpu(), values.sqrt().float().cpu(), float(self.energy), directions)


class _Tap(torch.autograd.Function):
    """The identity, which hands the input of a layer and the gradient of its output to a sketch."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, sketch: _Sketch) -> Tensor:
        """Of the output; the input is kept."""
        ctx.save_for_backward(x)
        ctx.sketch = sketch
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient, unchanged."""
        (x,) = ctx.saved_tensors
        ctx.sketch.add(x, gradients[0])
        return gradients[0], None, None


class Spectra:
    """Measures the layers of an attached model, whose fresh adapters only make gradients flow.

    Args:
        layers: by name; linear ones.
        most: directions wanted of each.
        seed: of the sketches: the same one, rows and model give the same result.

    Raises: RequestError for layers that are not linear.
    """

    def __init__(self, layers: Mapping[str, LowRankLayer], most: int, seed: int) -> None:
        for name, layer in layers.items():
            if not isinstance(layer.kind, LinearKind):
                what = "an embedding" if isinstance(layer.kind, EmbeddingKind) else "a convolution"
                raise RequestError(
                    f"'{name}' is {what}, and spectra are measured of linear layers only; leave it out of "
                    "target_modules, or use ranks.policy: layered with another init_lora_weights"
                )
        generator = torch.Generator().manual_seed(seed)
        self._most = most
        self._layers = dict(layers)
        self._sketches = {n: _Sketch(layer, most + OVERSAMPLING, generator) for n, layer in layers.items()}

    def passes(self) -> Iterator[int]:
        """Numbers of the passes: during each, the caller runs the same rows forward and backward."""
        with contextlib.ExitStack() as stack:
            for name, layer in self._layers.items():
                stack.callback(layer.register_forward_hook(_tapping(self._sketches[name])).remove)
            for number in range(PASSES):
                if number:
                    for sketch in self._sketches.values():
                        sketch.turn()
                yield number

    def results(self) -> dict[str, Spectrum]:
        """The spectrum of each layer. Each one's sketch is let go."""
        return {name: self._sketches.pop(name).result(self._most) for name in self._layers}


def _tapping(sketch: _Sketch) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _Tap.apply(output, inputs[0], sketch) if torch.is_grad_enabled() else output

    return hook


def share_out(
    gains: Mapping[str, list[float]],
    costs: Mapping[str, int],
    least: Mapping[str, int],
    most: Mapping[str, int],
    fits: Any,
) -> dict[str, int]:
    """Ranks from `least` up: the next one always where it gains most for each parameter, while `fits(ranks)`.

    Not one layer could have one rank more. With gains that fall from rank to rank that is the best use of the budget up
    to what is left of it. Ties, and what was not measured, go in the order of the layers.
    """
    ranks = dict(least)
    order = {name: number for number, name in enumerate(ranks)}

    def candidate(name: str) -> tuple[float, int, int, str]:
        known = gains[name]
        gain = known[ranks[name]] if ranks[name] < len(known) else 0.0
        return -gain / costs[name], ranks[name], order[name], name

    heap = [candidate(name) for name in ranks if ranks[name] < most[name]]
    heapq.heapify(heap)
    while heap:
        *_, name = heapq.heappop(heap)
        more = {**ranks, name: ranks[name] + 1}
        if not fits(more):
            continue  # nor will it later: ranks only grow
        ranks = more
        if ranks[name] < most[name]:
            heapq.heappush(heap, candidate(name))
    return ranks
