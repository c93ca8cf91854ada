"""Packed rows through a kernel for segments of different lengths: a reference kernel here, the real ones on CUDA."""

import pytest
import torch
from torch import nn

from rankwise.models import attention
from rankwise.models.attention import packed_inputs, packing_mode
from rankwise.models.loss import token_losses
from rankwise.models.probing import backbone
from rankwise.models.varlen import attend, kernel_for, varlen_kernel, window_of
from tests import tiny
from tests.models.batches import packed, rows_of
from tests.models.test_attention import losses_alone

LENGTHS = (19, 5, 1, 12)  # tests.tiny's windows are 8
BUILDS = {**{name: tiny.CAUSAL_LMS[name] for name in ("llama", "qwen", "mistral", "gemma3", "gpt2")}, "bert": tiny.bert}


def reference_kernel(query, key, value, boundaries, longest, scale, window):
    """What flash attention computes, by its documentation: segment by segment, in plain torch."""
    left, right = window
    outputs = []
    assert longest == int(boundaries.diff().max()) and boundaries.dtype == torch.int32
    for start, end in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        q, k, v = (part[start:end].transpose(0, 1) for part in (query, key, value))
        k, v = (part.repeat_interleave(q.shape[0] // k.shape[0], 0) for part in (k, v))
        scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        distance = torch.arange(end - start)[None, :] - torch.arange(end - start)[:, None]
        hidden = (distance > right) & (right >= 0) | (distance < -left) & (left >= 0)
        outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, int]]:
    """The windows of the calls that reach the kernel."""
    seen: list[tuple[int, int]] = []

    def kernel(*arguments):
        seen.append(arguments[-1])
        return reference_kernel(*arguments)

    monkeypatch.setattr(attention, "kernel_for", lambda query, value: kernel)
    return seen


@pytest.mark.parametrize("family", BUILDS)
def test_packed_rows_through_the_kernel_equal_rows_alone(family, calls):
    model, stock = BUILDS[family](), BUILDS[family]()
    assert packing_mode(model) == "segments"
    calls.clear()
    rows = rows_of(LENGTHS)
    body, alone = backbone(model), backbone(stock)
    with torch.no_grad():
        hidden = body(**packed_inputs(packed(rows), "segments", body))[0][0].split(LENGTHS)
        for found, (ids, _) in zip(hidden, rows, strict=True):
            torch.testing.assert_close(found, alone(input_ids=ids[None])[0][0], rtol=1e-5, atol=1e-5)
    wanted = {"bert": {(-1, -1)}, "mistral": {(7, 0)}, "gemma3": {(7, 0), (-1, 0)}}
    assert set(calls) == wanted.get(family, {(-1, 0)}) and len(calls) == 2, "one call a layer"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradients_through_the_kernel_equal_rows_alone(family, calls):
    model, stock = tiny.CAUSAL_LMS[family](), tiny.CAUSAL_LMS[family]()
    rows = rows_of(LENGTHS)
    token_losses(model, packed(rows)).sum().backward()
    torch.cat(losses_alone(stock, rows)).sum().backward()
    assert calls
    for one, other in zip(model.parameters(), stock.parameters(), strict=True):
        scale = max(other.grad.abs().max().item(), 1e-3)
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5 * scale)


def layer(causal: object) -> nn.Module:
    module = nn.Module()
    module.is_causal = causal
    return module


@pytest.mark.parametrize(
    ("causal", "has_mask", "options", "window"),
    [
        (True, False, {}, (-1, 0)), (False, False, {}, (-1, -1)), (True, True, {"sliding_window": 8}, (7, 0)),
        (True, False, {"sliding_window": 8}, (7, 0)), (True, False, {"sliding_window": None}, (-1, 0)),
        (True, False, {"is_causal": False}, (-1, -1)),
        # what the kernel is not told, or can't do
        (True, True, {}, None), (False, False, {"sliding_window": 8}, None), (True, False, {"dropout": 0.1}, None),
        (True, False, {"s_aux": torch.zeros(4)}, None), (True, False, {"position_bias": torch.zeros(1)}, None),
        (None, False, {}, None),
    ],
)  # fmt: skip
def test_only_what_the_kernel_can_do_reaches_it(causal, has_mask, options, window):
    mask = torch.ones(1, 1, 3, 3) if has_mask else None
    assert window_of(layer(causal), mask, options) == window


def test_no_kernel_on_a_cpu():
    query = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
    assert kernel_for(query, query) is None


@pytest.mark.gpu
@pytest.mark.parametrize("window", [(-1, 0), (-1, -1), (7, 0)], ids=str)
def test_the_installed_kernel_is_the_reference(window):
    """Written without a GPU at hand, and not yet run."""
    kernel = varlen_kernel()
    if kernel is None:
        pytest.skip("neither torch's varlen_attn nor flash-attn is installed")
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 37, 64), (1, 2, 37, 64), (1, 2, 37, 64))
    exact = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    given = tuple(part.cuda().bfloat16().requires_grad_() for part in exact)
    found = attend(kernel, given, list(LENGTHS), None, window)
    rounded = tuple(part.detach().cpu().float().requires_grad_() for part in given)
    wanted = attend(reference_kernel, rounded, list(LENGTHS), None, window)
    torch.testing.assert_close(found.detach().cpu().float(), wanted.detach(), rtol=2e-2, atol=2e-2)
    found.float().square().sum().backward()
    wanted.square().sum().backward()
    for one, other in zip(given, rounded, strict=True):
        torch.testing.assert_close(one.grad.cpu().float(), other.grad, rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_packed_rows_on_cuda_equal_rows_alone(family):
    """Written without a GPU at hand, and not yet run."""
    model = tiny.CAUSAL_LMS[family]().bfloat16().cuda()
    batch = packed(rows_of(LENGTHS)).to("cuda")
    assert packing_mode(model) in ("segments", "mask")
    exact = torch.cat(losses_alone(tiny.CAUSAL_LMS[family](), rows_of(LENGTHS)))
    torch.testing.assert_close(token_losses(model, batch).cpu(), exact, rtol=3e-2, atol=3e-2)
