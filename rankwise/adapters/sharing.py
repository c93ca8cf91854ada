"""What is computed once for several uses: what follows from parameters, and x A^T of layers that read the same input.

**Derived** tensors (A and B in another dtype, DoRA's norm) are kept until a parameter changes, by its identity, version
counter and address, or until its gradient is computed: optimisers that write past the counter do so after that. Where
a step takes several backward passes, `unchanging` around them keeps what one has made for the next.

**Readers** are layers that read the very same tensor: q, k, v; gate, up. Who they are is found when they are attached,
by what they are given. The first of them to be called computes x [A_1; A_2; ...]^T once; the others take their part of
it if they are given the same tensor, unchanged, while the factors are unchanged, and start anew otherwise. Only numbers
are shared, no part of an autograd graph, and `x` is held by a weak reference. So are the layers: a model that nobody
holds any more frees its memory at once, not when the garbage collector finds a ring.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@final
class Derived:
    """A tensor computed from others, without a gradient. Copies and pickles of this are empty."""

    def __init__(self) -> None:
        self._made: tuple[tuple[Tensor, ...], list[tuple[int, int]], Tensor] | None = None
        self._block: _Block | None = None
        """The `unchanging` that it was last used in."""

    def of(self, sources: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, called again when a source has changed."""
        if any(source.is_inference() for source in sources):  # they count no versions
            return make()
        if _within.block is not None:
            self._block = _within.block
        state = [(source._version, source.data_ptr()) for source in sources]
        made = self._made
        if made is None or made[1] != state or any(a is not b for a, b in zip(made[0], sources, strict=True)):
            made = self._made = (sources, state, make())
        return made[2]

    def stacked(self, parameters: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """The parameters in `dtype`, stacked along their first dimension."""
        if len(parameters) == 1 and parameters[0].dtype == dtype:
            return parameters[0].detach()
        copy = self.of(parameters, lambda: _stacked(parameters, dtype))
        return copy if copy.dtype == dtype else _stacked(parameters, dtype)

    def drop(self) -> None:
        """Called in a backward pass, forgets the tensor when that, or the `unchanging` around it, has ended.

        A pass that computes activations again must not find less than the forward pass did: it would then record more
        operations than selective checkpointing knows of.
        """
        if self._block is not None and not self._block.has_ended:
            self._block.dropped.append(self)
            return
        # torch's only way to the end of a backward pass, which its own data-parallel modules take too
        engine = torch.autograd.Variable._execution_engine  # pyright: ignore[reportPrivateUsage]
        engine.queue_callback(self.forget)

    def forget(self) -> None:
        """The tensor is made anew when it is next asked for."""
        self._made = self._block = None

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()


@dataclass
class _Block:
    """An `unchanging`, and what is to be forgotten at its end."""

    dropped: list[Derived] = field(default_factory=list)
    has_ended: bool = False


class _Within(threading.local):
    """What this thread is in. A backward pass may run in another: a tensor knows its block from the forward pass."""

    block: _Block | None = None


_within = _Within()


@contextlib.contextmanager
def unchanging() -> Generator[None, None, None]:
    """In the block, which may hold several backward passes, no parameter changes: it ends before the optimiser's step.

    What is derived from parameters is then made once for all of them. Blocks don't nest: an inner one does nothing.
    """
    if _within.block is not None:
        yield
        return
    _within.block = block = _Block()
    try:
        yield
    finally:
        _within.block, block.has_ended = None, True
        for derived in block.dropped:
            derived.forget()


@torch.no_grad()
def _stacked(parameters: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    return torch.cat([parameter.to(dtype) for parameter in parameters]) if parameters[1:] else parameters[0].to(dtype)


WIDEST_BYTES = 2
"""Of a number of x. One product of all factors may add up in another order than one of each: in fp32 there is hardly
anything to win, and outputs stay as close to PEFT's as its own layers would."""


@runtime_checkable
class Reader(Protocol):
    """A layer whose input goes through a factor A."""

    lora_A: nn.Parameter  # noqa: N815 (the paper's name)


@dataclass(frozen=True)
class _Reading:
    """x [A_1; A_2; ...]^T of one x."""

    x: weakref.ref[Tensor]
    version: int
    down: Float[Tensor, "R n"]
    h: Float[Tensor, "N R"]
    waiting: dict[int, slice]
    """By a layer's place among the readers: its part of R. Those that have taken it are out."""


@final
class Readers:
    """Layers that read one tensor."""

    def __init__(self, layers: Sequence[Reader]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self.derived = Derived()
        """Holds the factors [A_1; A_2; ...] in the dtype of x."""
        self._reading: _Reading | None = None

    @property
    def layers(self) -> tuple[Reader, ...]:
        """Those of them that are there: of a copy of one layer alone, only that one."""
        return tuple(layer for reference in self._layers if (layer := reference()) is not None)

    def read(self, layer: Reader, x: Float[Tensor, "*batch n"]) -> tuple[Tensor, Tensor] | None:
        """A in the dtype of x, and x A^T.

        None where x is wide, counts no versions or lies on another device, and for a layer that is none of these, as a
        replica of `nn.DataParallel` is.
        """
        if x.element_size() > WIDEST_BYTES or x.is_inference():
            return None
        layers = self.layers
        if len(layers) < len(self._layers) or any(reader.lora_A.device != x.device for reader in layers):
            return None
        place = next((number for number, reader in enumerate(layers) if reader is layer), None)
        if place is None:
            return None
        down = self.derived.stacked(tuple(reader.lora_A for reader in layers), x.dtype)
        reading = self._reading
        if (
            reading is None
            or reading.x() is not x
            or reading.version != x._version
            or reading.down is not down
            or place not in reading.waiting
        ):
            reading = _Reading(weakref.ref(x), x._version, down, _product(x, down), _parts(layers))
        part = reading.waiting.pop(place)
        self._reading = reading if reading.waiting else None
        return down[part], reading.h[:, part]

    def __getstate__(self) -> tuple[Reader, ...]:
        return self.layers

    def __setstate__(self, layers: tuple[Any, ...]) -> None:
        self._layers, self.derived, self._reading = [weakref.ref(layer) for layer in layers], Derived(), None


@torch.no_grad()
def _product(x: Float[Tensor, "*batch n"], down: Float[Tensor, "R n"]) -> Float[Tensor, "N R"]:
    return F.linear(x.reshape(-1, x.shape[-1]), down)


def _parts(layers: Sequence[Reader]) -> dict[int, slice]:
    parts: dict[int, slice] = {}
    end = 0
    for place, layer in enumerate(layers):
        begin, end = end, end + layer.lora_A.shape[0]
        parts[place] = slice(begin, end)
    return parts
