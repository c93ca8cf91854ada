"""Builds a TensorRT for RTX engine from an ONNX graph; no GPU is needed for that, and none is used.

The package `tensorrt-rtx-cu13` (NVIDIA, proprietary licence) compiles the graph for kinds of GPUs, not for this
machine's; the rest of the compilation happens where the engine is first run. Networks are strongly typed: the precision
is that of the graph. An input with an open axis gets its least, usual and largest shape.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import WorkError

CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")
"""GPUs that an engine is built for: Ampere (A100; RTX 30), Ada (RTX 40, L4, L40S), Blackwell (RTX 50).

Turing (SM75) has no products in fp32, which the adapter's stay in. Hopper is not among those that the package knows.
"""


Shapes = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""The least, the usual and the largest shape of an input."""


@dataclass(frozen=True)
class Engine:
    """What was built: bytes, layers after fusing, the inputs whose shape is open, and the GPUs that it is for."""

    num_bytes: int
    num_layers: int
    open_inputs: Sequence[str]
    capabilities: Sequence[str]


def build_engine(
    graph: Path, file: Path, shapes: Mapping[str, Shapes], capabilities: Sequence[str] = CAPABILITIES
) -> Engine:
    """Compiles the ONNX file `graph`, weights beside it, into `file`.

    `shapes`: of each input that has an open axis.

    Raises: WorkError for a graph that TensorRT does not take.
    """
    trt: Any = importlib.import_module("tensorrt_rtx")  # optional, and has no stubs
    logger, errors = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        reasons = [str(parser.get_error(place).desc()) for place in range(parser.num_errors)]
        raise WorkError(f"TensorRT can't read the graph: {'; '.join(reasons[:3]) or 'it does not say why'}")
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    open_inputs = []
    for place in range(network.num_inputs):
        tensor = network.get_input(place)
        if -1 in tuple(tensor.shape):
            open_inputs.append(tensor.name)
            profile.set_shape(tensor.name, *(tuple(shape) for shape in shapes[tensor.name]))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = len(capabilities)
    for place, name in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), place)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise WorkError(f"TensorRT could not build the engine: {errors[0] if errors else 'it does not say why'}")
    with file.open("wb") as handle:
        handle.write(memoryview(engine))
    return Engine(file.stat().st_size, network.num_layers, open_inputs, tuple(capabilities))


def _logger(trt: Any) -> tuple[Any, list[str]]:
    """A logger that keeps errors and prints nothing, and what it keeps."""
    errors: list[str] = []

    class Keeping(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)

    return Keeping(), errors
