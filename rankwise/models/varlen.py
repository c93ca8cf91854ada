"""Attention on packed rows in one kernel call, on CUDA: flash attention for sequences of different lengths.

Dao 2023, "FlashAttention-2" (arXiv 2307.08691). The kernel takes all tokens in a row, and where each segment begins;
causal and windowed attention are its own, so no mask is built. torch brings it (2.10 and later), and so does the
package flash-attn; torch's is taken first. Only half precision has kernels. Where the kernel can't do what a layer asks
for, its segments go through the layer's stock attention one at a time.

Legend: N tokens of all segments, S segments, h query heads, k key heads, d head dimension.
Written against torch 2.13's and flash-attn 2.8's signatures; compared with the loop on a CPU by a reference kernel, and
on CUDA by a test that needs one: no GPU was at hand to measure it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

Kernel = Callable[
    [Tensor, Tensor, Tensor, Tensor, int, "float | None", tuple[int, int]],
    Tensor,
]
"""query [N, h, d], key and value [N, k, d], boundaries [S + 1], longest segment, scale, (left, right): [N, h, d].

(left, right) are how many tokens before and after its own a token sees: -1 for all of them.
"""

HALVES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
"""The kernels' limit on the head dimension."""


@functools.cache
def varlen_kernel() -> Kernel | None:
    """The kernel that this installation has, or None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return _flash_attn()
    return _torch_kernel if {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys() else None


def _torch_kernel(
    query: Float[Tensor, "N h d"],
    key: Float[Tensor, "N k d"],
    value: Float[Tensor, "N k d"],
    boundaries: Int32[Tensor, " S1"],
    longest: int,
    scale: float | None,
    window: tuple[int, int],
) -> Float[Tensor, "N h d"]:
    from torch.nn.attention.varlen import varlen_attn

    grouped = query.shape[1] != key.shape[1]
    found = varlen_attn(
        query, key, value, boundaries, boundaries, longest, longest, scale=scale, window_size=window, enable_gqa=grouped
    )
    assert isinstance(found, Tensor)
    return found


def _flash_attn() -> Kernel | None:
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        boundaries: Tensor,
        longest: int,
        scale: float | None,
        window: tuple[int, int],
    ) -> Tensor:
        return flash_attn_varlen_func(
            query, key, value, boundaries, boundaries, longest, longest, softmax_scale=scale,
            causal=window[1] == 0, window_size=window,
        )  # fmt: skip

    return kernel


def kernel_for(query: Tensor, value: Tensor) -> Kernel | None:
    """The kernel for tensors of this device, dtype and size, or None."""
    fits = query.dtype in HALVES and query.shape[-1] == value.shape[-1] <= LARGEST_HEAD
    return varlen_kernel() if query.device.type == "cuda" and fits else None


def window_of(module: nn.Module, mask: Tensor | None, options: dict[str, Any]) -> tuple[int, int] | None:
    """(left, right) of a layer's attention, or None where they don't say all: dropout, a mask of another kind, sinks.

    A mask without a window is not understood; transformers' windows count a token itself.
    """
    causal = vars(module).get("is_causal") if options.get("is_causal") is None else options["is_causal"]
    window = options.get("sliding_window")
    beyond = options.get("dropout") or options.get("s_aux") is not None or options.get("position_bias") is not None
    if beyond or not isinstance(causal, bool):
        return None
    if isinstance(window, int):
        return (window - 1, 0) if causal else None
    if mask is not None:
        return None
    return (-1, 0) if causal else (-1, -1)


def attend(
    kernel: Kernel,
    qkv: tuple[Tensor, Tensor, Tensor],
    lengths: list[int],
    scale: float | None,
    window: tuple[int, int],
) -> Float[Tensor, "1 N h d"]:
    """Attention within segments of `lengths`; `qkv` are [1, heads, N, d], as in transformers' attention interface."""
    query, key, value = (part[0].transpose(0, 1).contiguous() for part in qkv)
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(query.device)
    return kernel(query, key, value, ends, max(lengths), scale, window)[None]
