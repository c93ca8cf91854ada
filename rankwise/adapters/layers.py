"""What a layer is, apart from how it is changed: how rank-r factors act on its input, and how its weight is laid out.

Each kind sees its weight as a matrix [o, n]: Linear [out, in]; Conv1D (GPT-2's linear) the transpose of its [in, out];
a convolution [out, in * kernel]; an embedding [dim, vocabulary], the transpose of its table.

A is [r, *a_tail], B is [o, r, *b_tail] with the tails of `sizes`.
"""

# transformers' Conv1D has no type stubs.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, final

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from rankwise.errors import RequestError


class LayerKind(ABC):
    """How one kind of layer takes low-rank factors."""

    name: ClassVar[str]
    a_key: ClassVar[str] = "lora_A.weight"
    b_key: ClassVar[str] = "lora_B.weight"
    drops_input: ClassVar[bool] = True
    """Whether dropout can act on the input (token ids can't be dropped)."""

    @abstractmethod
    def sizes(self, base: nn.Module) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """o, the trailing shape of A, the trailing shape of B."""

    @abstractmethod
    def down(self, base: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """The rank space's view of the input."""

    @abstractmethod
    def up(self, base: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        """From the rank space to the layer's output."""

    @abstractmethod
    def matrix(self, weight: Tensor) -> Float[Tensor, "o n"]:
        """A weight in the base's layout, as a matrix."""

    @abstractmethod
    def weight(self, matrix: Float[Tensor, "o n"], base: nn.Module) -> Tensor:
        """The inverse of `matrix`."""

    def check(self, base: nn.Module, name: str) -> None:  # noqa: B027 (most kinds take every layer)
        """Raises: RequestError for a layer of this kind that can't be adapted."""

    def spread(self, per_output: Float[Tensor, " o"], y: Tensor) -> Tensor:
        """A vector over outputs, shaped so that it multiplies the layer's output `y`."""
        return per_output.to(y.dtype)

    def num_inputs(self, base: nn.Module) -> int:
        """Size n of the matrix view."""
        return math.prod(self.sizes(base)[1])


@final
class LinearKind(LayerKind):
    """`nn.Linear`, weight [out, in]."""

    name = "linear"

    @override
    def sizes(self, base: nn.Module) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        assert isinstance(base, nn.Linear)
        return base.out_features, (base.in_features,), ()

    @override
    def down(self, base: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A)

    @override
    def up(self, base: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        return F.linear(h, B)

    @override
    def matrix(self, weight: Tensor) -> Float[Tensor, "o n"]:
        return weight

    @override
    def weight(self, matrix: Float[Tensor, "o n"], base: nn.Module) -> Tensor:
        return matrix

    @override
    def check(self, base: nn.Module, name: str) -> None:
        if isinstance(base, NonDynamicallyQuantizableLinear):
            raise RequestError(
                f"'{name}' is the output projection inside nn.MultiheadAttention, which reads its weight and never "
                "calls it: an adapter there would do nothing; exclude it"
            )


@final
class TransposedLinearKind(LayerKind):
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is [in, out]."""

    name = "conv1d-linear"

    @override
    def sizes(self, base: nn.Module) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        assert isinstance(base, Conv1D)
        return base.nf, (base.nx,), ()

    @override
    def down(self, base: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A)

    @override
    def up(self, base: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        return F.linear(h, B)

    @override
    def matrix(self, weight: Tensor) -> Float[Tensor, "o n"]:
        return weight.T

    @override
    def weight(self, matrix: Float[Tensor, "o n"], base: nn.Module) -> Tensor:
        return matrix.T


@final
class ConvolutionKind(LayerKind):
    """`nn.Conv1d`, `Conv2d`, `Conv3d`: A convolves with the base's kernel, B with a kernel of one."""

    name = "convolution"

    @override
    def sizes(self, base: nn.Module) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        assert isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        return base.out_channels, (base.in_channels, *base.kernel_size), (1,) * len(base.kernel_size)

    @override
    def down(self, base: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        # The base's own stride, padding, padding mode and dilation, so that the merged weight does the same.
        assert isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        return base._conv_forward(x, A, None)  # pyright: ignore[reportPrivateUsage]

    @override
    def up(self, base: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[B.dim()]
        return convolve(h, B)

    @override
    def matrix(self, weight: Tensor) -> Float[Tensor, "o n"]:
        return weight.flatten(1)

    @override
    def weight(self, matrix: Float[Tensor, "o n"], base: nn.Module) -> Tensor:
        assert isinstance(base.weight, Tensor)
        return matrix.reshape(base.weight.shape)

    @override
    def spread(self, per_output: Float[Tensor, " o"], y: Tensor) -> Tensor:
        raise AssertionError("no magnitude vector on convolutions")

    @override
    def check(self, base: nn.Module, name: str) -> None:
        assert isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        if base.groups > 1:
            raise RequestError(
                f"'{name}' is a grouped convolution (groups={base.groups}), whose low-rank change can't be merged; "
                "exclude it"
            )


@final
class EmbeddingKind(LayerKind):
    """`nn.Embedding`: A is a narrow table [r, vocabulary], B lifts its rows to the embedding's width."""

    name = "embedding"
    a_key = "lora_embedding_A"
    b_key = "lora_embedding_B"
    drops_input = False

    @override
    def sizes(self, base: nn.Module) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        assert isinstance(base, nn.Embedding)
        return base.embedding_dim, (base.num_embeddings,), ()

    @override
    def down(self, base: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        assert isinstance(base, nn.Embedding)
        return F.embedding(x, A.T, padding_idx=base.padding_idx)

    @override
    def up(self, base: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        return F.linear(h, B) * embedding_scale(base)

    @override
    def matrix(self, weight: Tensor) -> Float[Tensor, "o n"]:
        return weight.T

    @override
    def weight(self, matrix: Float[Tensor, "o n"], base: nn.Module) -> Tensor:
        return matrix.T


def embedding_scale(base: nn.Module) -> float:
    """What a scaled embedding (Gemma's) multiplies its rows with; 1 for a plain one.

    A buffer is rounded to the weight's dtype before, as Gemma's own forward does.
    """
    scale = getattr(base, "embed_scale", 1.0)  # a buffer, or a plain number, on transformers' scaled embeddings only
    if isinstance(scale, Tensor):
        assert isinstance(base.weight, Tensor)
        scale = scale.to(base.weight.dtype)
    return float(scale)


LAYER_KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LinearKind(),
    Conv1D: TransposedLinearKind(),
    nn.Conv1d: ConvolutionKind(),
    nn.Conv2d: ConvolutionKind(),
    nn.Conv3d: ConvolutionKind(),
    nn.Embedding: EmbeddingKind(),
}
"""Which layers can be adapted."""


def layer_kind(module: nn.Module) -> LayerKind | None:
    """The kind of `module` (subclasses count), or None when it can't be adapted."""
    for cls, kind in LAYER_KINDS.items():
        if isinstance(module, cls):
            return kind
    return None
