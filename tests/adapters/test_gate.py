"""Gates against each adapter alone and against the plain formula in float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankwise.adapters import gate as gate_module
from rankwise.adapters.config import LoraConfig
from rankwise.adapters.gate import ALWAYS, TOKENS_BY_ROW, GateLayer, Member
from rankwise.adapters.gate_config import EmbeddingConfig, GateConfig, check_names
from rankwise.adapters.layers import layer_kind
from rankwise.adapters.lora import LoraLayer
from rankwise.adapters.mixture import Mixture
from rankwise.errors import RequestError

TASKS = ("movies", "books", "games")
RANKS = (4, 1, 7)
SCALES = (2.0, 0.5, 3.0)
LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (3, 5, 12)),
    "long-rows": (lambda: nn.Linear(12, 8), (3, TOKENS_BY_ROW, 12)),
    "conv1d": (lambda: Conv1D(8, 12), (3, 5, 12)),
    "two-dimensional": (lambda: nn.Linear(12, 8), (3, 12)),
    "convolution": (lambda: nn.Conv2d(4, 6, (3, 2), padding=1), (3, 4, 9, 8)),
    "embedding": (lambda: nn.Embedding(20, 8), None),
}
layers = pytest.mark.parametrize("layer", LAYERS)


def made(layer="linear", gate=None, embedding=None, dtype=torch.float32, always=False):
    """A gate of three adapters, the same adapters alone, the base and an input of three rows."""
    build, shape = LAYERS[layer]
    base = build().to(dtype)
    kind = layer_kind(base)
    x = torch.randint(0, 20, (3, 7)) if shape is None else torch.randn(shape, dtype=dtype)
    members, alone = [], []
    ranks = RANKS if embedding is None else RANKS[:1]
    for place, (rank, scale) in enumerate(zip(ranks, SCALES, strict=False)):
        config = LoraConfig(r=rank, lora_alpha=scale * rank, init_lora_weights=False)
        one = LoraLayer(copy.deepcopy(base), kind, config, "layer")
        one.start_(config)
        one.to(dtype)
        task = ALWAYS if embedding is not None or (always and place == 2) else place
        members.append(Member(TASKS[place], task, one.lora_A.detach().clone(), one.lora_B.detach().clone(), one.scale))
        alone.append(one.eval())
    tasks = TASKS[:2] if always else TASKS
    mixture = Mixture(tasks, gate, embedding, num_entries=RANKS[0])
    gated = GateLayer(copy.deepcopy(base), kind, "layer", members, mixture)
    return gated.eval(), alone, base.requires_grad_(False), x, mixture


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@layers
@pytest.mark.parametrize("mode", ["hard", "soft", "top-k"])
def test_one_task_is_that_adapter_alone(layer, mode):
    gated, alone, _, x, mixture = made(layer, GateConfig(mode, k=2 if mode == "top-k" else None))
    for place, task in enumerate(TASKS):
        for given in (task, [task] * 3, {task: 1.0}, torch.tensor([place] * 3)):
            with mixture.routed(mixture.one(given)):
                assert relative(gated(x), alone[place](x)) < 1e-6


@layers
def test_a_mixed_batch_is_each_row_alone(layer):
    gated, alone, _, x, mixture = made(layer, GateConfig())
    ids = torch.tensor([2, 0, 1])
    with mixture.routed(ids):
        y = gated(x)
    for row, task in enumerate(ids.tolist()):
        assert relative(y[row : row + 1], alone[task](x[row : row + 1])) < 1e-6


def test_tokens_of_packed_rows_each_have_a_task():
    gated, alone, _, x, mixture = made("linear", GateConfig())
    ids = torch.randint(0, 3, (3, 5))
    with mixture.routed(ids):
        y = gated(x)
        flat = gated(x.flatten(0, 1))
    every = torch.stack([one(x) for one in alone])
    expected = every.gather(0, ids[None, :, :, None].expand(1, 3, 5, 8))[0]
    assert relative(y, expected) < 1e-6 and relative(flat, expected.flatten(0, 1)) < 1e-6


@pytest.mark.parametrize("layer", ["linear", "long-rows"])
def test_rows_that_beams_multiply_keep_their_task(layer):
    gated, alone, _, x, mixture = made(layer, GateConfig())
    with mixture.routed(torch.tensor([1, 2, 0])):
        y = gated(x.repeat_interleave(4, dim=0))
    for row, task in enumerate([1, 2, 0]):
        assert relative(y[4 * row : 4 * row + 4], alone[task](x[row : row + 1]).expand(4, -1, 8)) < 1e-6


def test_what_is_kept_between_calls_follows_the_factors():
    gated, alone, _, x, mixture = made("long-rows", GateConfig())
    ids = torch.tensor([0, 1, 2])
    with torch.no_grad(), mixture.routed(mixture.one(ids)):
        for by in (1.0, 0.5):
            for factors, one in zip(gated.lora_B, alone, strict=True):
                factors.mul_(by)
                one.lora_B.mul_(by)
            expected = torch.cat([one(x[row : row + 1]) for row, one in enumerate(alone)])
            assert relative(gated(x), expected) < 1e-6
            assert relative(gated(x[:, :2]), expected[:, :2]) < 1e-6
        ids[0] = 2
        assert relative(gated(x), expected) < 1e-6, "the caller's own ids may change afterwards"


@layers
def test_shares_are_the_sum_and_the_base_counts_once(layer):
    gated, alone, base, x, mixture = made(layer, GateConfig("soft"))
    logits = torch.tensor([0.3, -1.0, 0.8])
    mixture.logits.data = logits[None]
    shares = logits.softmax(0)
    expected = base(x) + sum(c * (one(x) - base(x)) for c, one in zip(shares, alone, strict=True))
    assert relative(gated(x), expected) < 1e-6
    merged = copy.deepcopy(base)
    merged.weight.data = gated.merged_weight()
    assert relative(merged(x), expected) < 1e-5
    low = gated.low_rank()
    assert low.A.shape[0] == sum(RANKS) and gated.rank == sum(RANKS)
    assert relative(gated.kind.weight(low.scale * low.B @ low.A, base), gated.delta_weight()) < 1e-6


def test_temperature_and_top_k_are_the_formula():
    gated, alone, base, x, mixture = made("linear", GateConfig("top-k", k=2, temperature=0.5))
    logits = torch.tensor([0.3, -1.0, 0.8])
    mixture.logits.data = logits[None]
    shares = (logits / 0.5).softmax(0) * torch.tensor([1.0, 0.0, 1.0])
    shares = shares / shares.sum()
    expected = base(x) + sum(c * (one(x) - base(x)) for c, one in zip(shares, alone, strict=True))
    assert relative(gated(x), expected) < 1e-6


@layers
def test_an_adapter_of_no_task_always_takes_part(layer):
    gated, alone, base, x, mixture = made(layer, GateConfig(), always=True)
    for given in ("books", ["books"] * 3):
        with mixture.routed(mixture.one(given)):
            assert relative(gated(x), alone[1](x) + alone[2](x) - base(x)) < 1e-6


@layers
def test_a_task_vector_scales_the_rank_space(layer):
    gated, (one,), _, x, mixture = made(layer, embedding=EmbeddingConfig())
    with mixture.routed(1):
        assert relative(gated(x), one(x)) < 1e-6, "vectors of ones change nothing"
    vectors = torch.randn(3, RANKS[0])
    for place, vector in enumerate(vectors):
        mixture.vectors[place].data = vector
    ids = torch.tensor([2, 0, 1])
    with mixture.routed(ids):
        y = gated(x)
    for row, task in enumerate(ids.tolist()):
        scaled = copy.deepcopy(one)
        scaled.lora_B.data = scaled.lora_B * vectors[task].view(1, -1, *[1] * (scaled.lora_B.dim() - 2))
        assert relative(y[row : row + 1], scaled(x[row : row + 1])) < 1e-6
        with mixture.routed(task):
            assert relative(gated.delta_weight(), scaled.delta_weight()) < 1e-6


@pytest.mark.parametrize("what", ["soft", "rows", "row-by-row", "embedding"])
def test_gradients_are_those_of_the_formula(what, monkeypatch):
    if what == "row-by-row":
        monkeypatch.setattr(gate_module, "TOKENS_BY_ROW", 1)
    gate = None if what == "embedding" else GateConfig("soft" if what == "soft" else "hard")
    gated, *_, x, mixture = made("linear", gate, EmbeddingConfig() if what == "embedding" else None, torch.float64)
    gated.scales = gated.scales.double()
    mixture.double()
    given = None if what == "soft" else torch.tensor([2, 0, 1])
    parameters = dict(gated.named_parameters()) | {f"m.{n}": p for n, p in mixture.named_parameters()}
    inputs = {name: p for name, p in parameters.items() if p.requires_grad}

    def run(x, *values):
        state = dict(zip(inputs, values, strict=True))
        own = {name: value for name, value in state.items() if not name.startswith("m.")}
        theirs = {name.removeprefix("m."): value for name, value in state.items() if name.startswith("m.")}
        with mixture.routed(given):
            return _called(gated, mixture, own, theirs, x)

    assert len(inputs) == {"soft": 7, "rows": 6, "row-by-row": 6, "embedding": 5}[what]
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *(p.detach().requires_grad_() for p in inputs.values())))


def _called(gated, mixture, own, theirs, x):
    """The layer with other numbers in place of its parameters and the mixture's."""
    both = nn.Module()
    both.layer, both.mixture = gated, mixture
    both.forward = lambda x: gated(x)
    values = {f"layer.{n}": v for n, v in own.items()} | {f"mixture.{n}": v for n, v in theirs.items()}
    return torch.func.functional_call(both, values, (x,))


def test_what_is_frozen_gets_no_gradient_and_the_shares_still_learn():
    gated, _, _, x, mixture = made("linear", GateConfig("soft"))
    for factor in (*gated.lora_A, *gated.lora_B):
        factor.requires_grad_(False)
    gated(x).square().mean().backward()
    assert mixture.logits.grad.abs().max() > 0
    assert all(p.grad is None for p in gated.parameters())


def test_a_row_trains_the_adapter_of_its_own_task_only():
    gated, _, _, x, mixture = made("linear", GateConfig())
    with mixture.routed(torch.tensor([1, 1, 1])):
        gated(x).square().mean().backward()
    assert [bool(factor.grad.abs().max() > 0) for factor in gated.lora_A] == [False, True, False]


@layers
def test_bf16(layer):
    gated, alone, _, x, mixture = made(layer, GateConfig(), dtype=torch.bfloat16)
    assert gated.lora_A[0].dtype == torch.bfloat16
    for factors in (gated.lora_A, gated.lora_B):
        for factor in factors:
            factor.data = factor.data.float()
    with mixture.routed(torch.tensor([1, 1, 1])):
        y = gated(x)
    assert y.dtype == torch.bfloat16 and relative(y.float(), alone[1](x).float()) < 0.02


def test_inactive_is_the_base_and_needs_no_task():
    gated, _, base, x, _ = made("linear", GateConfig())
    gated.active = False
    assert torch.equal(gated(x), base(x))


def test_without_a_task_there_is_no_silent_default():
    gated, _, _, x, mixture = made("linear", GateConfig())
    with pytest.raises(RequestError, match="a hard gate needs one of movies, books, games"):
        gated(x)
    with pytest.raises(RequestError, match="needs one of"):
        gated.delta_weight()
    embedded = made("linear", embedding=EmbeddingConfig())
    with pytest.raises(RequestError, match="task embedding needs one of"):
        embedded[0](x)
    with mixture.routed(torch.tensor([0, 1, 2])), pytest.raises(RequestError, match="differ by row"):
        gated.delta_weight()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("moovies", "unknown task 'moovies'; did you mean 'movies'"),
        (["movies", "x"], "unknown task 'x'; known: movies, books, games"),
        ([], "empty"),
        (3, "number 3 can't be: there are 3"),
        (torch.tensor([0, -1]), "number -1 can't be"),
        (torch.tensor([0, 5]), "number 5 can't be"),
        (torch.tensor([0.5]), "go by name"),
        ({"movies": float("nan")}, "finite"),
        ({"movies": 0.0}, "not 0"),
    ],
)
def test_tasks_that_can_t_be(task, message):
    mixture = Mixture(TASKS, GateConfig())
    with pytest.raises(RequestError, match=message):
        mixture.one(task)


def test_ids_that_don_t_fit_the_rows():
    gated, _, _, x, mixture = made("linear", GateConfig())
    with mixture.routed(torch.tensor([0, 1])), pytest.raises(RequestError, match="2 rows have a task where 'layer'"):
        gated(x)
    with mixture.routed(torch.zeros(3, 4, dtype=torch.long)), pytest.raises(RequestError, match="3 x 4 tokens"):
        gated(x)


def test_a_gate_has_no_rank_to_set():
    gated = made("linear", GateConfig())[0]
    with pytest.raises(RequestError, match="holds 3 adapters"):
        gated.resize_(3)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_share_a_mixture_of_their_own(again):
    gated, _, _, x, mixture = made("linear", GateConfig("soft"))
    mixture.routing.given = 1
    other, others = again((gated, mixture))
    assert other.mixture is others and others is not mixture
    assert others.routing.given is None
    others.logits.data[0, 0] = 5.0
    mixture.routing.given = None
    assert not torch.allclose(other(x), gated(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(mode="sfot"), "unknown gate mode 'sfot'; did you mean 'soft'"),
        (dict(mode="hard", temperature=2.0), "no effect with mode 'hard'"),
        (dict(mode="hard", per="layer"), "no effect"),
        (dict(mode="soft", per="row"), "unknown gate per"),
        (dict(mode="soft", temperature=0.0), "above 0"),
        (dict(mode="soft", k=2), "k=2 has no effect"),
        (dict(mode="top-k"), "needs k"),
        (dict(mode="top-k", k=0), "needs k"),
    ],
)
def test_settings_that_can_t_be(settings, message):
    with pytest.raises(RequestError, match=message):
        GateConfig(**settings)
    with pytest.raises(RequestError, match="unknown embedding per"):
        EmbeddingConfig("row")


def test_names_that_could_leave_their_folder():
    check_names(["movies", "a-b_2"])
    for bad in ("../x", "a/b", "", ".hidden", "a b", "-x", "x" * 65, "a.b"):
        with pytest.raises(RequestError, match="can't be used"):
            check_names([bad])
    with pytest.raises(RequestError, match="capitals only"):
        check_names(["Movies", "movies"])
    with pytest.raises(RequestError, match="twice"):
        check_names(["movies", "movies"])
    with pytest.raises(RequestError, match="no task"):
        check_names([])
    with pytest.raises(RequestError, match="leaves none"):
        GateConfig("top-k", k=3).check_tasks(TASKS)
