"""Writes adapters as ONNX Runtime reads them (`.onnx_adapter`): named tensors, and the version of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime

from rankwise.export.onnx_slots import AdapterTensors
from rankwise.files import replacing

ADAPTER_VERSION = 1


def write_adapter(adapter: AdapterTensors, file: Path, model_version: int) -> None:
    """Writes the tensors under the names of the graph's inputs; layers of rank 0 are left to the graph's defaults."""
    file.parent.mkdir(parents=True, exist_ok=True)
    parameters = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())
        for name, tensor in adapter.named().items()
        if tensor.numel()
    }
    content: Any = onnxruntime.AdapterFormat()  # its stubs ask for a PathLike, its code for a string
    content.set_adapter_version(ADAPTER_VERSION)
    content.set_model_version(model_version)
    content.set_parameters(parameters)
    with replacing(file) as temporary:
        content.export_adapter(str(temporary))
