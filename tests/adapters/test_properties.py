"""What every adapter on every layer with every start must satisfy. A new line in a table is tested here by itself."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.config import STARTS, LoraConfig
from rankwise.adapters.layers import LAYER_KINDS, ConvolutionKind, layer_kind
from rankwise.adapters.starts import STARTS as START_FUNCTIONS
from rankwise.adapters.starts import TAKEN_FROM_BASE
from rankwise.adapters.table import ADAPTERS

LAYERS: dict[type[nn.Module], tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    nn.Linear: (lambda: nn.Linear(12, 8), lambda: torch.randn(3, 5, 12)),
    Conv1D: (lambda: Conv1D(8, 12), lambda: torch.randn(3, 5, 12)),
    nn.Conv1d: (lambda: nn.Conv1d(4, 6, 3, padding=1, dilation=2), lambda: torch.randn(2, 4, 9)),
    nn.Conv2d: (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, padding_mode="reflect", bias=False),
        lambda: torch.randn(2, 4, 9, 8),
    ),
    nn.Conv3d: (lambda: nn.Conv3d(3, 6, (1, 2, 3)), lambda: torch.randn(2, 3, 5, 5, 5)),
    nn.Embedding: (lambda: nn.Embedding(20, 8, padding_idx=0), lambda: torch.randint(0, 20, (3, 7))),
}
INITS: list[bool | str] = [True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"]
SCALES = [(4, 8.0, False), (5, 3.0, True)]


def build(adapter: str, layer: type[nn.Module], init: bool | str, scale=SCALES[0], dropout=0.0, dtype=torch.float32):
    """A fresh adapter layer, its untouched base, and an input."""
    r, alpha, use_rslora = scale
    base = LAYERS[layer][0]().to(dtype)
    x = LAYERS[layer][1]()
    x = x.to(dtype) if x.is_floating_point() else x
    kind = layer_kind(base)
    settings = LoraConfig(r=r, lora_alpha=alpha, use_rslora=use_rslora, lora_dropout=dropout, init_lora_weights=init)
    wrapped = ADAPTERS[adapter](copy.deepcopy(base), kind, settings, "layer")
    wrapped.start_(settings)
    return wrapped.eval(), base.eval().requires_grad_(False), x


def trainable(layer: AdapterLayer) -> dict[str, nn.Parameter]:
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


def disturb(layer: AdapterLayer, by: float = 0.3) -> AdapterLayer:
    with torch.no_grad():
        for parameter in trainable(layer).values():
            parameter.add_(torch.randn_like(parameter) * by)
    return layer


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


PAIRS = [
    (adapter, layer)
    for adapter in ADAPTERS
    for layer in LAYERS
    if not (adapter == "dora" and isinstance(LAYER_KINDS[layer], ConvolutionKind))
]
pairs = pytest.mark.parametrize(("adapter", "layer"), PAIRS, ids=lambda v: v if isinstance(v, str) else v.__name__)
inits = pytest.mark.parametrize("init", INITS, ids=str)
scales = pytest.mark.parametrize("scale", SCALES, ids=["alpha-over-r", "alpha-over-root-r"])


def test_every_line_of_the_tables_is_covered():
    assert set(LAYERS) == set(LAYER_KINDS)
    assert {name for name in INITS if isinstance(name, str) and "niter" not in name} == set(STARTS) - {"kaiming"}
    assert set(START_FUNCTIONS) == set(STARTS) | {"random"}


@pairs
@inits
@scales
def test_fresh_is_the_base_to_the_last_bit(adapter, layer, init, scale):
    wrapped, base, x = build(adapter, layer, init, scale)
    if init is False:
        assert not torch.equal(wrapped(x), base(x))
    else:
        assert torch.equal(wrapped(x), base(x))
        wrapped.train()
        assert torch.equal(wrapped(x), base(x))


@pairs
@inits
def test_fresh_is_the_base_under_dropout(adapter, layer, init):
    if init is False:
        pytest.skip("random B is not the identity")
    wrapped, base, x = build(adapter, layer, init, dropout=0.5)
    assert torch.equal(wrapped.train()(x), base(x))


@pairs
@inits
def test_a_start_never_changes_the_base(adapter, layer, init):
    wrapped, base, _ = build(adapter, layer, init)
    assert torch.equal(wrapped.base.weight, base.weight)


@pairs
@inits
@scales
def test_merged_equals_unmerged(adapter, layer, init, scale):
    wrapped, base, x = build(adapter, layer, init, scale)
    disturb(wrapped)
    merged = copy.deepcopy(base)
    merged.weight.data = wrapped.merged_weight()
    assert relative(merged(x), wrapped(x)) < 1e-5
    assert not torch.allclose(wrapped(x), base(x))


@pairs
def test_merged_equals_unmerged_in_bf16(adapter, layer):
    """Within 2 % of the largest output: the merged weight is rounded once (8 bits), the activations several times."""
    wrapped, base, x = build(adapter, layer, True, dtype=torch.bfloat16)
    disturb(wrapped)
    merged = copy.deepcopy(base)
    merged.weight.data = wrapped.merged_weight()
    assert merged.weight.dtype == torch.bfloat16 and wrapped(x).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in trainable(wrapped).values())
    assert relative(merged(x).float(), wrapped(x).float()) < 0.02


@pairs
@scales
def test_delta_is_the_formula_in_float64(adapter, layer, scale):
    wrapped, base, _ = build(adapter, layer, False, scale)
    disturb(wrapped)
    r, alpha, use_rslora = scale
    s = alpha / r**0.5 if use_rslora else alpha / r
    kind = LAYER_KINDS[layer]
    A = wrapped.lora_A.detach().double().flatten(1)
    B = wrapped.lora_B.detach().double().flatten(1)
    W = kind.matrix(base.weight.double())
    expected = s * B @ A
    if adapter == "dora":
        directed = W + expected
        expected = wrapped.magnitude.double()[:, None] * directed / directed.norm(dim=1, keepdim=True) - W
    assert relative(kind.matrix(wrapped.delta_weight().double()), expected) < 1e-5


@pairs
@inits
def test_only_the_adapter_learns(adapter, layer, init):
    wrapped, base, x = build(adapter, layer, init, dropout=0.1)
    wrapped.train()
    optimizer = torch.optim.AdamW(trainable(wrapped).values(), lr=0.01)
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    for _ in range(2):  # the factor whose partner is zero moves in the second step
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()
    for name, parameter in wrapped.named_parameters():
        if name.startswith("base."):
            assert parameter.grad is None and not parameter.requires_grad and parameter not in optimizer.state
            assert torch.equal(parameter, before[name])
        else:
            assert parameter.grad is not None and not torch.equal(parameter, before[name]), name
    assert torch.equal(wrapped.base.weight, base.weight)


@pairs
@inits
@scales
def test_growth_keeps_the_function_and_learns(adapter, layer, init, scale):
    wrapped, _, x = build(adapter, layer, init, scale)
    disturb(wrapped)
    before = wrapped(x)
    assert wrapped.resize_(11) == 0.0
    assert wrapped.rank == 11
    assert relative(wrapped(x), before) < 1e-6 * 3
    wrapped(x).square().mean().backward()
    new_columns = wrapped.lora_B.grad[:, scale[0] :]
    assert new_columns.abs().max() > 0, "grown rank must receive gradients"


@pairs
@scales
def test_shrinking_is_the_best_approximation(adapter, layer, scale):
    wrapped, _, _ = build(adapter, layer, False, scale)
    disturb(wrapped)
    before = wrapped.delta().double()
    error = wrapped.resize_(2)
    U, S, Vh = torch.linalg.svd(before.detach(), full_matrices=False)
    best = (U[:, :2] * S[:2]) @ Vh[:2]
    assert relative(wrapped.delta().double(), best) < 1e-4
    assert error == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-4)


@pairs
def test_a_fresh_layer_still_learns_after_shrinking(adapter, layer):
    wrapped, _, x = build(adapter, layer, "gaussian")
    wrapped.resize_(2)
    wrapped(x).square().mean().backward()
    assert max(float(p.grad.abs().max()) for p in trainable(wrapped).values()) > 0


@pairs
@inits
def test_deepcopy_and_pickle(adapter, layer, init):
    wrapped, _, x = build(adapter, layer, init)
    disturb(wrapped)
    expected = wrapped(x)
    for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert torch.equal(twin(x), expected)
        disturb(twin)
        assert torch.equal(wrapped(x), expected)


@pairs
@inits
def test_names_of_peft_round_trip(adapter, layer, init):
    wrapped, _, x = build(adapter, layer, init)
    disturb(wrapped)
    tensors = {name: tensor.clone() for name, tensor in wrapped.to_peft().items()}
    doubled = wrapped.start_A is not None
    other, _, _ = build(adapter, layer, True, scale=(8, 16.0, False) if doubled else SCALES[0])
    other.base.load_state_dict(wrapped.base.state_dict())
    own = other.peft_parameters()
    assert {name: tensor.shape for name, tensor in tensors.items()} == {name: p.shape for name, p in own.items()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    assert relative(other(x), wrapped(x)) < 1e-5
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in other.to_peft().items())


@pairs
def test_inactive_is_the_base(adapter, layer):
    wrapped, base, x = build(adapter, layer, False)
    wrapped.active = False
    assert torch.equal(wrapped(x), base(x))


@pairs
@inits
def test_low_rank_is_the_delta(adapter, layer, init):
    wrapped, _, _ = build(adapter, layer, init)
    disturb(wrapped)
    parts = wrapped.low_rank()
    if adapter == "dora":
        assert parts is None
        return
    expected = LAYER_KINDS[layer].matrix(wrapped.delta_weight())
    assert relative(parts.scale * parts.B @ parts.A, expected) < 1e-4
    assert (init in TAKEN_FROM_BASE) <= (parts.A.shape[0] == 2 * wrapped.rank)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda v: v.__name__)
def test_dropout_acts_in_training_on_the_adapter_only(layer):
    wrapped, _, x = build("lora", layer, False, dropout=0.5)
    wrapped.train()
    differs = not torch.equal(wrapped(x), wrapped(x))
    assert differs == LAYER_KINDS[layer].drops_input  # token ids can't be dropped
    wrapped.eval()
    assert torch.equal(wrapped(x), wrapped(x))


def test_init_scale_multiplies_the_variance_of_A():
    base = nn.Linear(64, 64)
    found = {}
    for init_scale in (1.0, 3.0):
        torch.manual_seed(1)
        settings = LoraConfig(r=8, lora_alpha=8.0, init_scale=init_scale)
        wrapped = ADAPTERS["lora"](base, layer_kind(base), settings, "layer")
        wrapped.start_(settings)
        found[init_scale] = wrapped.lora_A.detach().var().item()
    assert found[3.0] / found[1.0] == pytest.approx(3.0, rel=1e-4)


def test_pissa_starts_at_the_principal_directions():
    wrapped, base, _ = build("lora", nn.Linear, "pissa")
    U, S, Vh = torch.linalg.svd(base.weight, full_matrices=False)
    principal = (U[:, :4] * S[:4]) @ Vh[:4]
    A, B, s = wrapped.lora_A, wrapped.lora_B, wrapped.scale
    assert relative(s * B @ A, principal) < 1e-5


def test_olora_has_orthonormal_columns():
    wrapped, _, _ = build("lora", nn.Linear, "olora")
    B = wrapped.lora_B
    assert torch.allclose(B.T @ B, torch.eye(4), atol=1e-6)


def test_gradients_equal_autograd_of_the_formula():
    """Against a float64 formula written out here."""
    wrapped, base, x = build("lora", nn.Linear, False)
    wrapped(x).square().sum().backward()
    A = wrapped.lora_A.detach().double().requires_grad_()
    B = wrapped.lora_B.detach().double().requires_grad_()
    y = x.double() @ base.weight.double().T + base.bias.double() + 2.0 * (x.double() @ A.T) @ B.T
    y.square().sum().backward()
    assert relative(wrapped.lora_A.grad.double(), A.grad) < 1e-5
    assert relative(wrapped.lora_B.grad.double(), B.grad) < 1e-5
