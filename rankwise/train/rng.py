"""Random numbers: seeding, and the generators' states as tensors, so that a resumed run draws the same ones."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

PROCESS_STRIDE = 0x9E3779B97F4A7C15
"""Seeds of the processes of one run lie so far apart (2**64 over the golden ratio): no two of them coincide."""


def process_seed(seed: int, rank: int, step: int = 0) -> int:
    """The seed of what process `rank` draws alone (dropout): `seed` itself for the first process of a new run.

    `step`: after which a process without a saved state joins the run.
    """
    return (seed + PROCESS_STRIDE * rank + step) % 2**63


def seed_everything(seed: int) -> None:
    """Seeds torch (all devices), numpy and Python's `random`."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The states of all generators that a forward pass on `device` may draw from, as uint8 tensors."""
    state = {
        "torch": torch.get_rng_state(),
        "python": _to_bytes(random.getstate()),
        "numpy": _to_bytes(_numpy_state()),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts back what `rng_state` gave. A state taken on another kind of device leaves this device's own generator."""
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = _from_bytes(state["python"])
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = _from_bytes(state["numpy"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"].cpu())


@contextlib.contextmanager
def untouched(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """In the block the model is in eval mode without gradients; after it, modes and generators are as before.

    So evaluation and generation change no training result.
    """
    state = rng_state(device)
    training = {name: module.training for name, module in model.named_modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
        set_rng_state(state, device)


def _numpy_state() -> list[Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return [name, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)]


def _to_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.cpu().tolist()).decode())
