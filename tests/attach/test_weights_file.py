"""Our reader of safetensors against the library's: the same tensors, and no file taken that the library refuses."""

from __future__ import annotations

import json
import random
import struct

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from rankwise.attach.weights_file import DTYPES, read_weights
from rankwise.errors import RequestError


def tensors_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"b.lora_B": (3, 2), "a.lora_A": (2, 5), "scalar": (), "empty": (0, 4), "odd": (3,)}
    return {name: (torch.rand(shape, generator=generator) * 9).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_reads_what_the_library_writes(dtype, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(tensors_of(dtype), path, metadata={"format": "pt"})
    found, wanted = read_weights(path).tensors, load_file(path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_mixed_dtypes_and_unaligned_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    mixed = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(2, 3), "c": torch.randn(2).bfloat16()}
    header, data, place = {}, b"", 0
    for name, tensor in mixed.items():  # in this order the float32 is not aligned, as the library never writes it
        raw = bytes(tensor.view(torch.uint8).flatten().tolist())
        kind = next(key for key, dtype in DTYPES.items() if dtype == tensor.dtype)
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [place, place + len(raw)]}
        data, place = data + raw, place + len(raw)
    path.write_bytes(file_of(header, data))
    found = read_weights(path)
    assert found.flat is None and found.not_finite() is None
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in mixed.items())


def file_of(header: object, data: bytes = b"") -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: object = 0, end: object = 8, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DATA = bytes(8)
FORGED = {
    "nothing": b"",
    "short": b"\x10\x00",
    "header longer than the file": struct.pack("<Q", 99) + b"{}",
    "header of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "no JSON": file_of("{"),
    "no object": file_of("[]"),
    "deep": file_of("[" * 99_999),
    "text is no entry": file_of({"a": "F32"}, DATA),
    "unknown dtype": file_of({"a": entry(dtype="F33")}, DATA),
    "no offsets": file_of({"a": {"dtype": "F32", "shape": [2]}}, DATA),
    "three offsets": file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, DATA),
    "negative shape": file_of({"a": entry(shape=[-1, -2])}, DATA),
    "true is no size": file_of({"a": entry(shape=[True, 2])}, DATA),
    "a number with a point": file_of({"a": entry(shape=[2.0])}, DATA),
    "text for a size": file_of({"a": entry(shape=["2"])}, DATA),
    "shape is text": file_of({"a": entry(shape="22")}, DATA),
    "beyond the end": file_of({"a": entry(end=16, shape=[4])}, DATA),
    "before the start": file_of({"a": entry(begin=-8, end=0)}, DATA),
    "more than the shape": file_of({"a": entry(shape=[1])}, DATA),
    "bytes to spare": file_of({"a": entry()}, DATA + b"x"),
    "a gap": file_of({"a": entry(begin=4, end=12)}, DATA + bytes(4)),
    "an overlap": file_of({"a": entry(), "b": entry(begin=4, end=12)}, DATA + bytes(4)),
    "a name twice": file_of('{"a": %s, "a": %s}' % ((json.dumps(entry()),) * 2), DATA),
}


@pytest.mark.parametrize("content", FORGED.values(), ids=FORGED.keys())
def test_forged_files_are_refused_in_one_line(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(RequestError, match="is torn or not a safetensors file: ") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


def test_whatever_is_damaged_the_library_would_take_it_too(tmp_path):
    path = tmp_path / "x.safetensors"
    whole = save(tensors_of(torch.float32), metadata={"format": "pt"})
    draw, taken = random.Random(0), 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            content[int(len(content) * draw.random() ** 0.5)] = draw.randrange(256)  # the data more often
        path.write_bytes(content[: draw.choice([*[len(content)] * 5, draw.randrange(len(content))])])
        try:
            found = read_weights(path).tensors
        except RequestError:
            continue
        taken += 1
        try:
            wanted = load_file(path)
        except (SafetensorError, UnicodeDecodeError) as error:
            raise AssertionError(f"the library refuses it: {error}") from error
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[k].nan_to_num(), wanted[k].nan_to_num()) for k in wanted)
    assert 5 < taken < 140


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_found_by_name(dtype, value, tmp_path):
    path = tmp_path / "x.safetensors"
    given = {name: torch.ones(50).to(dtype) for name in "abc"}
    given["b"][17] = value
    save_file(given, path)
    assert read_weights(path).not_finite() == "b"
    given["b"][17] = 1
    save_file(given, path)
    assert read_weights(path).not_finite() is None


def test_values_whose_sum_overflows_are_finite(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.full((9,), 3e38), "b": torch.full((9,), 6e4).half().float()}, path)
    assert read_weights(path).not_finite() is None
