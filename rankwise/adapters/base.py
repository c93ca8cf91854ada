"""The contract of every adapter layer: a frozen `base` and a trainable change to it.

Legend: o outputs of the layer, n inputs (for a convolution: channels times kernel; for an embedding: the vocabulary),
r rank. `delta_weight` and `merged_weight` have the layout of `base.weight`, whatever that is; how it is stored (8 or 4
bits) is `rankwise.quantized`'s business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise import quantized
from rankwise.errors import RequestError


@dataclass(frozen=True)
class LowRank:
    """A change of the form scale * B A, as matrices."""

    A: Float[Tensor, "r n"]
    B: Float[Tensor, "o r"]
    scale: float


class AdapterLayer(nn.Module, ABC):
    """Wraps `base`, which stays as it is. While `active` is false the layer is its base.

    Adapter parameters are fp32 whatever the base's dtype.
    """

    base: nn.Module
    active: bool
    borrows_base: bool
    """Whether the base's weight is whole during the layer's forward only, and lies elsewhere each time: it is spread
    over processes."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        base.requires_grad_(False)
        self.base = base
        self.active = True
        self.borrows_base = False

    @property
    def weight(self) -> Tensor:
        """The base's weight: transformers ties and inspects weights through this name."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def base_weight(self) -> Float[Tensor, "..."]:
        """The base's weight as numbers: dequantised, in fp32, where it is stored in 8 or 4 bits. Not a copy."""
        return quantized.dense_weight(self.base)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, if it has one."""
        # an embedding has no such attribute; a replica of nn.DataParallel has no such parameter
        return getattr(self.base, "bias", None)

    @property
    def rank(self) -> int:
        """Rank of the trainable change; 0 where rank means nothing."""
        return 0

    @abstractmethod
    def delta_weight(self) -> Float[Tensor, "..."]:
        """merged_weight - base_weight in fp32, in the layout of `base.weight`."""

    @abstractmethod
    def peft_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters under PEFT's names, relative to the layer (`lora_A.weight`)."""

    def to_peft(self) -> dict[str, Tensor]:
        """What PEFT's file holds for this layer: the parameters, unless there is more to the change."""
        return {name: parameter.detach() for name, parameter in self.peft_parameters().items()}

    def resize_(self, rank: int, generator: torch.Generator | None = None) -> float:
        """Grows (the function stays) or shrinks (the best approximation) to `rank`, in place.

        Returns the relative Frobenius error of the change: 0 for a growth.
        """
        raise RequestError(f"{type(self).__name__} has no rank to set to {rank}")

    def low_rank(self) -> LowRank | None:
        """The change as scale * B A, or None where it is not of this form."""
        return None

    def merged_weight(self, dtype: torch.dtype | None = None) -> Float[Tensor, "..."]:
        """The base's weight with the change, in fp32 or wider, rounded once to `dtype`.

        By default that is the base's own, fp32 where it is stored in 8 or 4 bits.
        """
        weight = self.base_weight()
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.delta_weight().detach()
        return merged.to(dtype or weight.dtype)

    def merged_bias(self) -> Float[Tensor, " o"] | None:
        """The bias that the merged layer has; None: the base's own, if it has one."""
        return None
