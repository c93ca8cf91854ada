"""Runs an engine from `rankwise export --to tensorrt` on a GPU that it was built for.

Inputs and outputs are torch tensors on the device; the cache of one call is the next call's. Written against the
package's interface (tensorrt-rtx 1.7); the machine that built this had no such GPU, so its test is marked `gpu`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int64
from safetensors.torch import load_file
from torch import Tensor

from rankwise.errors import RequestError

MANIFEST = "rankwise_tensorrt.json"


@final
class EngineModel:
    """An engine with one adapter, or with none where `adapter` is False (rank 0: the base).

    Raises: RequestError when the folder is none, or the engine can't be loaded on this machine.
    """

    def __init__(self, folder: str | Path, adapter: bool = True) -> None:
        trt: Any = importlib.import_module("tensorrt_rtx")  # optional, and has no stubs
        place = Path(folder)
        if not (place / MANIFEST).is_file():
            raise RequestError(f"'{folder}' is no TensorRT export: it has no {MANIFEST}")
        if not torch.cuda.is_available():
            raise RequestError(f"'{folder}' holds an engine for a GPU, and this machine has none that torch can use")
        self.manifest: dict[str, Any] = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self.engine = runtime.deserialize_cuda_engine((place / self.manifest["engine"]).read_bytes())
        if self.engine is None:
            able = ", ".join(self.manifest["capabilities"])
            raise RequestError(f"this GPU can't load '{place / self.manifest['engine']}', which is for {able}")
        self.context = self.engine.create_execution_context()
        self.adapter = self._adapter(place, adapter)

    def _adapter(self, place: Path, wanted: bool) -> dict[str, Tensor]:
        if self.manifest["adapter"] is None:
            if not wanted:
                raise RequestError("the adapter of this export is merged into its engine: there is no base alone")
            return {}
        tensors = load_file(place / self.manifest["adapter"], device="cuda")
        if wanted:
            return tensors
        return {name: t[:, :0] if name.endswith(".lora_A") else t[:0] for name, t in tensors.items()}

    def logits(self, ids: Sequence[int]) -> Float[Tensor, "T V"]:
        """Logits of every position of one row."""
        row = torch.tensor([list(ids)], device="cuda")
        return self._call(row, torch.arange(len(ids), device="cuda"), self._empty())[0][0]

    def generate(self, ids: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int] = ()) -> list[int]:
        """The greedy continuation of one row, up to and without the first of `stop_ids`."""
        written: list[int] = []
        cache, new = self._empty(), torch.tensor([list(ids)], device="cuda")
        for _ in range(max_new_tokens):
            last = torch.tensor([new.shape[1] - 1], device="cuda")
            logits, cache = self._call(new, last, cache)
            token = int(logits[0, -1].argmax())
            if token in stop_ids:
                break
            written.append(token)
            new = torch.tensor([[token]], device="cuda")
        return written

    def _empty(self) -> list[Tensor]:
        return [torch.zeros(1, heads, 0, width, device="cuda") for heads, width in self.manifest["cache"]]

    def _call(
        self, ids: Int64[Tensor, "1 T"], positions: Int64[Tensor, " K"], cache: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits [1, K, V] and the cache after `ids`."""
        total = cache[0].shape[2] + ids.shape[1]
        names = [f"{i // 2}.{('key', 'value')[i % 2]}" for i in range(len(cache))]
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones(1, total, dtype=torch.long, device="cuda"),
            "logit_positions": positions,
            **{f"past_key_values.{name}": tensor for name, tensor in zip(names, cache, strict=True)},
            **self.adapter,
        }
        held = {name: tensor.contiguous() for name, tensor in inputs.items()}
        for name, tensor in held.items():
            self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, tensor.data_ptr() or _somewhere())
        outputs = {
            name: torch.empty(tuple(self.context.get_tensor_shape(name)), device="cuda")
            for name in ("logits", *(f"present.{name}" for name in names))
        }
        for name, tensor in outputs.items():
            self.context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream()
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise RequestError("the engine refused the call: a row, a batch or a rank is beyond what it was built for")
        stream.synchronize()
        return outputs["logits"], [outputs[f"present.{name}"] for name in names]


_PLACES: list[Tensor] = []


def _somewhere() -> int:
    """An address on the device for tensors without elements, which have none."""
    if not _PLACES:
        _PLACES.append(torch.zeros(1, device="cuda"))
    return _PLACES[0].data_ptr()
