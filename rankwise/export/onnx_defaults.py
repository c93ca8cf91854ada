"""Defaults for a graph's adapter inputs: initializers of the same names, so that a run without an adapter is the base.

Added last: whatever rewrites a graph takes an initializer for a constant, and would bake rank 0 in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx.numpy_helper import from_array

from rankwise.errors import WorkError

LARGE_BYTES = 1024
"""Weights from this size on lie in the file beside the graph."""


def add_defaults(model: onnx.ModelProto, defaults: Mapping[str, np.ndarray]) -> None:
    """Gives the inputs named in `defaults` these values. The axis that is 0 in a default is named after its layer."""
    inputs = {value.name: value for value in model.graph.input}
    for name, values in defaults.items():
        shape = inputs[name].type.tensor_type.shape
        for axis, size in zip(shape.dim, values.shape, strict=True):
            axis.Clear()
            if size:
                axis.dim_value = size
            else:
                axis.dim_param = f"{name.rpartition('.')[0]}.rank"
        model.graph.initializer.append(from_array(np.ascontiguousarray(values), name))


def check_inputs(models: Sequence[onnx.ModelProto], names: Sequence[str]) -> None:
    """Raises: WorkError when an adapter input is gone from a graph, or no node of any reads it: a rewriting has baked
    it in.
    """
    inputs = [{value.name for value in model.graph.input} for model in models]
    read = {name for model in models for node in model.graph.node for name in node.input}
    lost = [name for name in names if name not in read or not all(name in there for there in inputs)]
    if lost:
        raise WorkError(
            f"the graph has lost {len(lost)} of its {len(names)} adapter inputs ('{lost[0]}'); report this: an adapter "
            "would have no effect there"
        )


def save_graph(model: onnx.ModelProto, file: Path) -> None:
    """Writes the graph, and its large weights into one file beside it."""
    onnx.save_model(
        model, str(file), save_as_external_data=True, all_tensors_to_one_file=True, location=f"{file.name}.data",
        size_threshold=LARGE_BYTES,
    )  # fmt: skip
    weights = file.with_name(f"{file.name}.data")
    if weights.exists():  # the package makes it readable for its owner alone
        weights.chmod(file.stat().st_mode)
