"""In which precision the frozen base computes. Adapters and their optimizer state are always fp32.

fp16 has bf16's size, finer steps and a far smaller range: its gradients need `rankwise.train.scale`.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rankwise.errors import RequestError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROBED = (torch.float32, torch.bfloat16)

PROBE_TOKENS = 256
PROBE_WIDTH = 768
PROBE_REPEATS = 7
BF16_MARGIN = 1.15
"""bf16 rounds, so it must pay: it is taken where it is faster by at least this factor."""


@dataclass(frozen=True)
class Precision:
    """What was taken (`fp32`, `bf16` or `fp16`), and why, in a few words."""

    name: str
    why: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen base's weights."""
        return DTYPES[self.name]


def choose_precision(name: str, device: torch.device) -> Precision:
    """`fp32`, `bf16` and `fp16` as they are; `auto` by a probe of some tens of milliseconds on `device`.

    Raises: RequestError where fp16 is asked for and the device can't compute in it.
    """
    if name == "fp16":
        return Precision(name, _fp16_reason(device))
    if name != "auto":
        return Precision(name, "as asked for")
    fp32_s, bf16_s = probe(device)
    ratio = fp32_s / bf16_s
    figures = f"probe on {device}: fp32 {fp32_s * 1e3:.2f} ms, bf16 {bf16_s * 1e3:.2f} ms"
    if ratio >= BF16_MARGIN:
        return Precision("bf16", f"{ratio:.1f} times as fast as fp32 ({figures})")
    return Precision("fp32", f"bf16 is not at least {BF16_MARGIN} times as fast here ({figures})")


def _fp16_reason(device: torch.device) -> str:
    """What to say of fp16 on `device`. Raises: RequestError when a small attention there fails."""
    x = torch.ones(1, 1, 2, 4, device=device, dtype=torch.float16, requires_grad=True)
    try:
        F.scaled_dot_product_attention(F.linear(x, x[0, 0, :1].expand(4, 4)), x, x).sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        text = " ".join(str(error).split())[:120]
        raise RequestError(f"fp16 does not work on {device} ({text}); use bf16 or fp32") from error
    return "as asked for" + ("; a CPU is slow at it, bf16 has the same size" if device.type == "cpu" else "")


def probe(device: torch.device) -> tuple[float, float]:
    """Seconds (median, taken in turns) for a linear layer's forward and backward to its input: fp32, then bf16."""
    inputs = {
        dtype: (
            torch.ones(PROBE_TOKENS, PROBE_WIDTH, device=device, dtype=dtype),
            torch.ones(PROBE_WIDTH, PROBE_WIDTH, device=device, dtype=dtype),
        )
        for dtype in PROBED
    }
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in inputs}
    for repeat in range(PROBE_REPEATS + 2):
        for dtype, (x, weight) in inputs.items():
            _wait(device)
            started = time.perf_counter()
            y = x @ weight.T
            _ = y @ weight
            _wait(device)
            if repeat >= 2:  # the first rounds warm caches and kernels up
                times[dtype].append(time.perf_counter() - started)
    return statistics.median(times[torch.float32]), statistics.median(times[torch.bfloat16])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
