"""Attention by blocks against the formula in float64, and as what models attend with in bf16 on a CPU."""

import logging

import pytest
import torch
import torch.nn.functional as F

from rankwise.models import attention, blocked
from rankwise.models.attention import SEGMENTED, packing_mode, prefer_blocks
from rankwise.models.blocked import blocked_attention, fits
from rankwise.models.loss import token_losses
from tests import tiny
from tests.models.batches import packed, padded, rows_of

SHAPES = {  # B, h, k, L, d, e
    "one head": (1, 1, 1, 5, 8, 8),
    "grouped": (2, 6, 2, 37, 16, 16),
    "several blocks": (2, 4, 4, 300, 16, 16),
    "grouped, several blocks": (1, 6, 2, 260, 32, 32),
    "values of another size": (2, 4, 2, 20, 24, 16),
    "one key head": (3, 4, 1, 140, 16, 16),
}
SOME = {"input_ids": tiny.token_ids(2, 9)}
MASKS = ("causal", "none", "window", "padding", "added")


@pytest.fixture
def bf16_products(monkeypatch) -> None:
    """As if on a CPU that multiplies bf16: the results are the same ones everywhere, only slower."""
    monkeypatch.setattr(blocked, "has_bf16_products", lambda: True)


def tensors(shape, dtype=torch.bfloat16, scale=1.5):
    batch, heads, keys, length, size, value_size = shape
    generator = torch.Generator().manual_seed(3)

    def draw(number, width):
        drawn = scale * torch.randn(batch, length, number, width, generator=generator)
        return drawn.to(dtype).transpose(1, 2).requires_grad_()  # as projections leave them

    return draw(heads, size), draw(keys, size), draw(keys, value_size)


def mask_of(kind, batch, length):
    if kind == "window":
        distance = torch.arange(length)[:, None] - torch.arange(length)
        return ((distance >= 0) & (distance < 4))[None, None]
    if kind == "padding":  # on the left in one row, so that its first queries see nothing but what is not there
        mask = torch.ones(batch, 1, length, length, dtype=torch.bool).tril()
        mask[0, :, :, :2] = False
        return mask
    if kind == "added":
        return torch.where(torch.ones(length, length).tril() > 0, 0.5, torch.finfo(torch.bfloat16).min)[None, None]
    return None


def formula(query, key, value, mask, causal, scale=None):
    """softmax(scale q k^T + mask) v in float64, [B, L, h, e]."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e30) if mask.dtype == torch.bool else scores + mask.double()
        seen = scores.amax(-1, keepdim=True) > -1e30
        return (scores.softmax(-1) * seen @ value).transpose(1, 2)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def with_gradients(attend, inputs):
    """The output, and gradients of a weighted sum of it."""
    output = attend(*inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    gradients = torch.autograd.grad((output * weights.to(output.dtype)).sum(), inputs)
    return [output, *gradients]


def error(found, wanted) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients_are_those_of_the_formula(shape, kind):
    inputs = tensors(shape)
    mask, causal = mask_of(kind, shape[0], shape[3]), kind == "causal"
    found = with_gradients(lambda q, k, v: blocked_attention(q, k, v, mask, causal, None), inputs)
    wanted = with_gradients(lambda q, k, v: formula(q, k, v, mask, causal), inputs)
    for name, one, other in zip(("output", "query", "key", "value"), found, wanted, strict=True):
        assert one.dtype == torch.bfloat16 and one.shape == other.shape
        # of five tokens hardly anything is left once what all keys share has been taken off: rounding is seen larger
        assert error(one, other) < (2e-2 if shape[3] == 5 else 6e-3), name


@pytest.mark.parametrize("kind", ["causal", "none"])
def test_no_less_exact_than_flash_attention(kind):
    inputs = tensors((2, 6, 2, 300, 32, 32))

    def flash(query, key, value):
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=kind == "causal", enable_gqa=True
        ).transpose(1, 2)  # fmt: skip

    wanted = with_gradients(lambda q, k, v: formula(q, k, v, None, kind == "causal"), inputs)
    ours = with_gradients(lambda q, k, v: blocked_attention(q, k, v, None, kind == "causal", None), inputs)
    theirs = with_gradients(flash, inputs)
    for one, other, exact in zip(ours, theirs, wanted, strict=True):
        assert error(one, exact) < 1.5 * error(other, exact)


def test_blocks_and_heads_at_a_time_change_rounding_only(monkeypatch):
    inputs = tensors((2, 4, 2, 50, 16, 16))
    whole = with_gradients(lambda q, k, v: blocked_attention(q, k, v, None, True, None), inputs)
    monkeypatch.setattr(blocked, "BLOCK", 7)
    monkeypatch.setattr(blocked, "SCORES", 300)
    cut = with_gradients(lambda q, k, v: blocked_attention(q, k, v, None, True, None), inputs)
    for one, other in zip(cut, whole, strict=True):
        assert error(one, other) < 4e-3


def test_the_scale_is_the_layers_own():
    inputs = tensors((1, 2, 2, 20, 16, 16))
    found = blocked_attention(*inputs, None, True, 0.02)
    assert error(found, formula(*inputs, None, True, 0.02)) < 5e-3
    assert error(found, formula(*inputs, None, True)) > 0.1


def test_autocast_rounds_no_scores():
    inputs = tensors((1, 2, 2, 40, 16, 16), scale=4.0)
    plain = blocked_attention(*inputs, None, True, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(blocked_attention(*inputs, None, True, None), plain)


@pytest.mark.parametrize("kind", [torch.bool, torch.bfloat16], ids=["bool", "added"])
def test_a_query_that_sees_nothing_gets_zeros_as_under_stock_attention(kind):
    inputs = tensors((2, 2, 2, 10, 16, 16))
    mask = mask_of("padding", 2, 10)
    if kind != torch.bool:
        mask = torch.zeros(mask.shape, dtype=kind).masked_fill_(~mask, -torch.inf)
    found = with_gradients(lambda q, k, v: blocked_attention(q, k, v, mask, False, None), inputs)
    stock = with_gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2), inputs)
    assert not found[0][0, :2].any()
    for one, other in zip(found, stock, strict=True):
        assert error(one, other) < 6e-3


def test_what_does_not_fit_is_left_to_stock_attention(bf16_products, monkeypatch):
    query, key, value = tensors((2, 4, 2, 10, 16, 16))
    assert fits(query, key, value, None)
    assert fits(query, key, value, mask_of("padding", 2, 10))
    assert not fits(query[:, :, -1:], key, value, None), "a token that is generated"
    assert not fits(query[:, :, -4:], key, value, None), "a cache"
    assert not fits(query.float(), key.float(), value.float(), None)
    assert not fits(query, key, value, torch.zeros(2, 4, 10, 10)), "a mask for each head"
    assert not fits(query, key, value, torch.zeros(1, 1, 10, 10, requires_grad=True)), "a mask that is learned"
    monkeypatch.setattr(blocked, "LONGEST", 9)
    assert not fits(query, key, value, None)


def test_only_where_the_cpu_multiplies_bf16(monkeypatch):
    blocked.has_bf16_products.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert not blocked.has_bf16_products()
    assert not fits(*tensors((1, 2, 2, 10, 16, 16)), None)
    blocked.has_bf16_products.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert blocked.has_bf16_products()
    blocked.has_bf16_products.cache_clear()


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The lengths of rows that went through blocks."""
    lengths: list[int] = []

    def counted(query, *others):
        lengths.append(query.shape[2])
        return blocked_attention(query, *others)

    monkeypatch.setattr(blocked, "blocked_attention", counted)
    return lengths


@pytest.mark.parametrize("batches", [packed, padded])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "qwen"])
def test_losses_and_gradients_of_models(family, batches, bf16_products, calls):
    build = tiny.CAUSAL_LMS[family]
    model, stock, exact = build().bfloat16(), build().bfloat16(), build().bfloat16().float()
    batch = batches(rows_of((19, 5, 12)))
    attention._LOOKED_AT.add(stock)

    def run(one):
        losses = token_losses(one, batch)
        losses.sum().backward()
        gradients = [p.grad.float().flatten() for p in one.parameters() if p.grad is not None]
        return losses.detach(), torch.cat(gradients)

    wanted, wanted_gradients = run(exact)
    found, gradients = run(model)
    assert calls, "no row went through blocks"
    number = len(calls)
    if batches is padded:
        theirs, their_gradients = run(stock)
        assert len(calls) == number, "the reference went through blocks"
        assert error(gradients, wanted_gradients) < 1.3 * error(their_gradients, wanted_gradients)
        assert error(found, wanted) < 1.5 * error(theirs, wanted) + 1e-3
    assert error(found, wanted) < 0.02
    assert error(gradients, wanted_gradients) < 0.1


def test_packed_rows_are_the_rows_alone(bf16_products, calls):
    model = tiny.llama().bfloat16()
    rows = rows_of((19, 5, 12))
    together = token_losses(model, packed(rows))
    alone = [token_losses(model, padded([row])) for row in rows]
    assert calls
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-2, atol=1e-2)


def test_models_that_gain_nothing_keep_their_attention(bf16_products):
    for model in (tiny.llama(), tiny.t5().bfloat16(), tiny.CAUSAL_LMS["gemma2"]().bfloat16()):
        before = model.config._attn_implementation
        prefer_blocks(model, SOME)
        assert model.config._attn_implementation == before


def test_blocks_that_differ_are_noticed(bf16_products, monkeypatch, caplog):
    monkeypatch.setattr(blocked, "blocked_attention", lambda q, *others: torch.randn_like(q.transpose(1, 2)))
    model = tiny.llama().bfloat16()
    with caplog.at_level(logging.WARNING):
        prefer_blocks(model, SOME)
    assert model.config._attn_implementation == "sdpa"
    assert "keeps stock attention" in caplog.text


def test_packing_works_after_blocks_and_the_other_way_round(bf16_products):
    model = tiny.llama().bfloat16()
    prefer_blocks(model, SOME)
    assert model.config._attn_implementation == SEGMENTED["sdpa"]
    assert packing_mode(model) == "segments"
    other = tiny.llama().bfloat16()
    packing_mode(other)
    prefer_blocks(other, SOME)
    assert packing_mode(other) == "segments"


def test_dropout_and_generation_go_through_stock_attention(bf16_products, calls):
    model = tiny.llama().bfloat16()
    prefer_blocks(model, SOME)
    calls.clear()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.train()(input_ids=tiny.token_ids(2, 8))
    assert not calls
    model.eval().generate(tiny.token_ids(1, 6), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert set(calls) <= {6}, "tokens that are generated have a cache"


def test_training_after_inference_mode():
    """Memory that is kept from call to call must serve both."""
    vars(blocked._scratch).clear()
    blocked._ahead.cache_clear()
    inputs = tensors((1, 2, 2, 20, 16, 16))
    with torch.inference_mode():
        blocked_attention(*(part.detach().clone() for part in inputs), None, True, None)
    found = with_gradients(lambda q, k, v: blocked_attention(q, k, v, None, True, None), inputs)
    assert error(found[0], formula(*inputs, None, True)) < 6e-3
