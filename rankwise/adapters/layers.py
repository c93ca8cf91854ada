"""What a layer is, apart from how it is changed: how rank-r factors act on its input, and how its weight is laid out.

Each kind sees its weight as a matrix [o, n]: Linear [out, in]; Conv1D (GPT-2's linear) the transpose of its [in, out];
a convolution [out, in * kernel]; an embedding [dim, vocabulary], the transpose of its table.
"""

# transformers' Conv1D has no type stubs.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from rankwise.quantized import weight_shape


@dataclass(frozen=True)
class LayerKind(ABC):
    """How one kind of layer takes low-rank factors."""

    transposed: bool = False
    """Whether the weight is laid out [inputs, outputs]."""

    a_key: ClassVar[str] = "lora_A.weight"
    b_key: ClassVar[str] = "lora_B.weight"
    drops_input: ClassVar[bool] = True
    """Whether dropout can act on the input (token ids can't be dropped)."""

    @abstractmethod
    def down(self, base: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """The rank space's view of the input."""

    @abstractmethod
    def up(self, base: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        """From the rank space to the layer's output."""

    def matrix(self, weight: Tensor) -> Float[Tensor, "o n"]:
        """A weight in the base's layout, as a matrix."""
        return weight.T if self.transposed else weight.flatten(1)

    def weight(self, matrix: Float[Tensor, "o n"], base: nn.Module) -> Tensor:
        """The inverse of `matrix`."""
        return (matrix.T if self.transposed else matrix).reshape(weight_shape(base))

    def factor_shapes(self, base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A, [r, n], and B, [o, r]; of a convolution [r, in, *kernel] and [o, r, *ones]."""
        shape = weight_shape(base)
        num_outputs, *inputs = reversed(shape) if self.transposed else shape
        return (rank, *inputs), (num_outputs, rank, *(1 for _ in inputs[1:]))


@final
class LinearKind(LayerKind):
    """`nn.Linear`, also in 8 or 4 bits, and transposed transformers' `Conv1D` (GPT-2)."""

    @override
    def down(self, base: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A)

    @override
    def up(self, base: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        return F.linear(h, B)


@final
class ConvolutionKind(LayerKind):
    """`nn.Conv1d`, `Conv2d`, `Conv3d`: A convolves with the base's kernel, B with a kernel of one."""

    @override
    def down(self, base: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        # The base's own stride, padding, padding mode and dilation, so that the merged weight does the same.
        assert isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        return base._conv_forward(x, A, None)  # pyright: ignore[reportPrivateUsage]

    @override
    def up(self, base: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[B.dim()]
        return convolve(h, B)


@final
class EmbeddingKind(LayerKind):
    """`nn.Embedding`: A is a narrow table [r, vocabulary], B lifts its rows to the embedding's width."""

    a_key = "lora_embedding_A"
    b_key = "lora_embedding_B"
    drops_input = False

    @override
    def down(self, base: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        assert isinstance(base, nn.Embedding)
        return F.embedding(x, A.T, padding_idx=base.padding_idx)

    @override
    def up(self, base: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        return F.linear(h, B) * embedding_scale(base)


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
    Conv1D: LinearKind(transposed=True),
    nn.Conv1d: ConvolutionKind(),
    nn.Conv2d: ConvolutionKind(),
    nn.Conv3d: ConvolutionKind(),
    nn.Embedding: EmbeddingKind(transposed=True),
}
"""Which layers can be adapted."""


def layer_kind(module: nn.Module) -> LayerKind | None:
    """The kind of `module` (subclasses count), or None when it can't be adapted."""
    return next((kind for cls, kind in LAYER_KINDS.items() if isinstance(module, cls)), None)
