"""The fused linear layer against plain autograd of the same formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rankwise.adapters import fused, low_rank
from rankwise.adapters.config import LoraConfig
from rankwise.adapters.dropout import keep_rule, kept_entries, spread
from rankwise.adapters.fused import Factors, lora_linear
from rankwise.attach.inject import attach
from tests import tiny


def parts(dtype=torch.float32, bias=True, shape=(3, 5)):
    x = torch.randn(*shape, 7, dtype=dtype, requires_grad=True)
    W = torch.randn(6, 7, dtype=dtype)
    b = torch.randn(6, dtype=dtype, requires_grad=True) if bias else None
    A = torch.randn(2, 7, dtype=torch.float32 if dtype == torch.bfloat16 else dtype, requires_grad=True)
    B = torch.randn(6, 2, dtype=A.dtype, requires_grad=True)
    return x, W, b, A, B


def linear(x, W, b, A, B, scale, dropout=0.0):
    factors = Factors(A, B, scale, A.detach().to(x.dtype), B.detach().to(x.dtype))
    return lora_linear(x, W, b, factors, keep_rule(dropout) if dropout else None)


def plain(x, W, b, A, B, scale):
    return F.linear(x, W, b) + scale * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (4,), (0, 5), (2, 1, 3), (8, 5)], ids=str)
def test_output_and_gradients_equal_the_formula(bias, shape):
    arguments = parts(torch.float64, bias, shape)
    leaves = [a for a in arguments if a is not None and a.requires_grad]
    mine, theirs = linear(*arguments, 1.7), plain(*arguments, 1.7)
    grad = torch.randn_like(theirs)
    assert torch.allclose(mine, theirs)
    for a, b in zip(torch.autograd.grad(mine, leaves, grad), torch.autograd.grad(theirs, leaves, grad), strict=True):
        assert torch.allclose(a, b)
    with torch.no_grad():
        assert torch.allclose(linear(*arguments, 1.7), theirs)


def test_the_sum_is_formed_for_very_many_tokens_of_wide_numbers():
    """Not in bf16, where an update of half of the weight's last digit would be lost."""
    W = torch.empty(6, 7)
    assert fused.forms_sum(torch.empty(40, 7), W) and fused.forms_sum(torch.empty(26, 7), W)
    assert not fused.forms_sum(torch.empty(25, 7), W)
    assert not fused.forms_sum(torch.empty(40, 7).bfloat16(), W.bfloat16())
    # an update of a thousandth of W: 1.001 is 1 in bf16, but beside the canceled W x it shows
    W, A, B = torch.ones(6, 7).bfloat16(), torch.tensor([[1.0, 1, 1, 1, 1, 1, 2]]), torch.full((6, 1), 1e-3)
    x = torch.tensor([[1.0, -1, 1, -1, 1, -2, 1]]).bfloat16().expand(40, 7)
    assert torch.allclose(linear(x, W, None, A, B, 1.0).float(), torch.tensor(1e-3), rtol=0.01)


def test_gradcheck_in_float64():
    x, W, b, A, B = parts(torch.float64)
    assert torch.autograd.gradcheck(lambda x, b, A, B: linear(x, W, b, A, B, 0.3), (x, b, A, B))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("swiglu", [False, True])
def test_gradients_can_be_differentiated(monkeypatch, swiglu, dropout):
    """For penalties on gradients and products with the Hessian; the first gradients are the same either way."""
    x, W, b, A, B = parts(torch.float64)
    other = torch.randn_like(x).requires_grad_()
    if not swiglu:
        other = None
    rule = keep_rule(dropout) if dropout else None
    kept = kept_entries(x.numel(), rule, x.device) if rule else None
    monkeypatch.setattr(fused, "kept_entries", lambda count, rule, device: kept)

    def output(x, b, A, B, *other):
        factors = Factors(A, B, 0.3, A.detach(), B.detach())
        return lora_linear(x, W, b, factors, rule, *other)

    leaves = [x, b, A, B, *([] if other is None else [other])]
    assert torch.autograd.gradgradcheck(output, leaves)
    loss = output(*leaves).sin().sum()
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(once, again, strict=True))


def test_a_penalty_on_gradients_trains_the_factors():
    """Of a whole model in fp32, against plain autograd (the base's hook keeps the fused function away)."""
    found = []
    for hook in (False, True):
        model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
        torch.manual_seed(0)
        for layer in model[::2]:
            layer.reset_parameters()
        attach(model, LoraConfig(r=2, init_lora_weights=False), torch.Generator().manual_seed(0))
        if hook:
            for layer in model[:3:2]:
                layer.base.register_forward_hook(lambda *_: None)
        x = torch.linspace(-1, 1, 35).view(5, 7).requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True))


def test_bf16_with_fp32_factors():
    """The factors' gradients are fp32; within 2 % of the largest fp64 gradient."""
    arguments = parts(torch.bfloat16)
    linear(*arguments, 0.5).float().square().sum().backward()
    x, W, b, A, B = arguments
    wide = [t.detach().double().requires_grad_() for t in (x, W, b, A, B)]
    plain(*wide, 0.5).square().sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    for grad, exact in ((A.grad, wide[3].grad), (B.grad, wide[4].grad), (x.grad, wide[0].grad)):
        assert (grad.double() - exact).abs().max() <= 0.02 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dropout_is_the_formula_with_its_own_mask(monkeypatch, dtype):
    """Output and every gradient equal autograd's of the same formula, with the mask that was drawn."""
    arguments = parts(dtype)
    wide = [a.detach().double().requires_grad_(a.requires_grad) for a in arguments]
    rule = keep_rule(0.3)
    kept = kept_entries(15 * 7, rule, torch.device("cpu"))
    monkeypatch.setattr(fused, "kept_entries", lambda count, rule, device: kept)
    mine = linear(*arguments, 1.7, dropout=0.3)
    x, W, b, A, B = wide
    dropped = x * spread(kept, torch.ones(15, 7, dtype=dtype)).bool().double().view(x.shape) / rule.probability
    theirs = F.linear(x, W, b) + 1.7 * F.linear(F.linear(dropped, A), B)
    grad = torch.randn_like(theirs).to(dtype)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()
    leaves = [0, 2, 3, 4]
    found = torch.autograd.grad(mine, [arguments[i] for i in leaves], grad)
    exact = torch.autograd.grad(theirs, [wide[i] for i in leaves], grad.double())
    for a, e in zip(found, exact, strict=True):
        assert (a - e).abs().max() <= tolerance * e.abs().max()


def test_rates_without_a_rule_take_the_plain_path():
    layer = attach(nn.Sequential(nn.Linear(400, 8)), LoraConfig(r=2, lora_dropout=1e-6, target_modules=["0"]))[0]
    assert not layer.train()._can_fuse(torch.randn(5, 400)) and layer.eval()._can_fuse(torch.randn(5, 400))


def doubled(module, inputs, output=None):
    return output * 2 if output is not None else (inputs[0] * 2,)


@pytest.mark.parametrize("listener", ["hook", "pre-hook", "forward"])
def test_hooks_and_replaced_forwards_of_the_base_act(listener):
    """Offloading hangs on them; a fresh adapter is the base with them, to the last bit."""
    base = nn.Linear(7, 6)
    if listener == "hook":
        base.register_forward_hook(doubled)
    elif listener == "pre-hook":
        base.register_forward_pre_hook(doubled)
    else:
        original = base.forward
        base.forward = lambda x: original(x) * 2
    x = torch.randn(3, 7)
    expected = base(x)
    model = attach(nn.Sequential(base), LoraConfig(r=2, target_modules=["0"]))
    assert torch.equal(model(x), expected)


def test_dropout_follows_the_seed():
    arguments = parts()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(linear(*arguments, 1.0, dropout=0.5).detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_decoding_in_bf16_is_the_formula(rows):
    """Within 2 % of the largest fp64 output."""
    W, A, B = torch.randn(6, 7).bfloat16(), torch.randn(4, 7), torch.randn(6, 4)
    x = torch.randn(1, rows, 7).bfloat16()
    with torch.no_grad():
        y = linear(x, W, None, A, B, 0.5)
    exact = plain(x.double(), W.double(), None, A.double(), B.double(), 0.5)
    assert y.dtype == torch.bfloat16 and y.shape == exact.shape
    assert (y.double() - exact).abs().max() <= 0.02 * exact.abs().max()


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("rows", [0, 1, 2, 32, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_through_a_layer_is_the_formula_and_leaves_what_a_hook_holds(dtype, rows, rank):
    model = attach(
        nn.Sequential(nn.Linear(7, 6)).to(dtype), LoraConfig(r=rank, target_modules="0", init_lora_weights=False)
    )
    layer, x = model.eval()[0], torch.randn(rows, 7).to(dtype)
    rounding = 1e-6 if dtype == torch.float32 else 0.02
    with torch.no_grad():
        y = layer(x)
        exact = F.linear(x.double(), layer.merged_weight(torch.float64), layer.base.bias.double())
        largest = exact.abs().max().item() if rows else 0.0
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=rounding * largest)
        held = []
        layer.base.register_forward_hook(lambda module, arguments, output: held.append(output))
        assert torch.allclose(layer(x), y, rtol=rounding, atol=rounding)
        assert torch.equal(held[0], layer.base(x))


@pytest.mark.parametrize(("rows", "rank", "is_short"), [(1, 1, True), (32, 1, True), (33, 1, False), (32, 200, False)])
def test_few_rows_take_the_shortest_way_at_any_rank(rows, rank, is_short, monkeypatch):
    model = attach(nn.Sequential(nn.Linear(7, 6)), LoraConfig(r=rank, target_modules="0", init_lora_weights=False))
    model.eval()
    fused = []
    monkeypatch.setattr(low_rank, "lora_linear", lambda *parts: fused.append(parts) or lora_linear(*parts))
    with torch.no_grad():
        model(torch.randn(rows, 7))
    assert bool(fused) != is_short


def test_only_needed_gradients_are_made():
    x, W, b, A, B = parts()
    y = linear(x.detach(), W, b.detach(), A, B.detach(), 1.0)
    y.sum().backward()
    assert A.grad is not None and B.grad is None and x.grad is None and b.grad is None


def saved_bytes(model) -> int:
    total = 0

    def pack(tensor):
        nonlocal total
        if not isinstance(tensor, nn.Parameter):
            total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tiny.token_ids(rows=4, length=64)).logits.sum()
    return total


def test_a_model_trains_the_same_with_and_without(monkeypatch):
    """Same losses as the plain path over ten steps in fp32, and fewer bytes kept for the backward pass."""
    from rankwise.adapters.lora import LoraLayer

    losses, kept = {}, {}
    for with_it in (True, False):
        if not with_it:
            monkeypatch.setattr(LoraLayer, "_can_fuse", lambda self, x: False)
        torch.manual_seed(0)
        model = attach(tiny.llama(), LoraConfig(r=4)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        losses[with_it] = []
        for seed in range(10):
            ids = tiny.token_ids(seed=seed)
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[with_it].append(loss.item())
        kept[with_it] = saved_bytes(model)
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)
    assert kept[True] < kept[False]


def test_autocast_takes_the_plain_path(monkeypatch):
    from rankwise.adapters.lora import LoraLayer

    model = attach(tiny.llama(), LoraConfig(r=4, init_lora_weights=False))
    ids = tiny.token_ids()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids).logits
        logits.float().sum().backward()
        monkeypatch.setattr(LoraLayer, "_can_fuse", lambda self, x: False)
        assert torch.equal(model(ids).logits, logits)
