"""x A^T shared among layers that read the same tensor, and what is derived from parameters once."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref

import pytest
import torch
from torch import nn

from rankwise.adapters import sharing
from rankwise.adapters.config import LoraConfig
from rankwise.adapters.low_rank import LowRankLayer
from rankwise.adapters.sharing import Derived, Readers, unchanging
from rankwise.attach.attachment import adapter_layers
from rankwise.attach.inject import attach, detach, disabled
from rankwise.attach.readers import _inputs, join_readers
from rankwise.ranks.dynamic import set_ranks
from rankwise.train.recompute import enable_gradient_checkpointing
from tests import tiny


def layers_of(model) -> dict[str, LowRankLayer]:
    return {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, LowRankLayer)}


def groups(model) -> set[frozenset[str]]:
    names = {layer: name for name, layer in layers_of(model).items()}
    return {frozenset(names[reader] for reader in layer.readers.layers) for layer in names if layer.readers}


@pytest.fixture
def wide(monkeypatch):
    """Shares in fp32 and fp64 as well, where a wrong number can't be taken for rounding."""
    monkeypatch.setattr(sharing, "WIDEST_BYTES", 8)


def short(names: set[frozenset[str]]) -> set[frozenset[str]]:
    return {frozenset(name.rsplit(".", 1)[-1] for name in group) for group in names}


def randomised(model, **settings):
    settings = {"r": 4, "init_lora_weights": False, **settings}
    return attach(model, LoraConfig(**settings))


def unshared(monkeypatch):
    monkeypatch.setattr(Readers, "read", lambda self, layer, x: None)


def gradients(model, ids):
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


BLOCK = {frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"})}
FAMILIES = {
    "llama": (tiny.llama, BLOCK),
    "qwen": (tiny.qwen, BLOCK),
    "mistral": (tiny.mistral, BLOCK),
    "gemma2": (tiny.gemma2, BLOCK),
    "gemma3": (tiny.gemma3, BLOCK),
    "mixtral": (tiny.mixtral, {frozenset({"q_proj", "k_proj", "v_proj"})}),  # its experts are no linear layers
    "bert": (tiny.bert, {frozenset({"query", "key", "value"})}),
    "gpt2": (tiny.gpt2, set()),  # q, k and v are one layer there
    # attention and MLP side by side, on one input
    "gptj": (tiny.gptj, {frozenset({"q_proj", "k_proj", "v_proj", "fc_in"})}),
    "cohere": (tiny.cohere, {frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})}),
    # in cross attention q reads the decoder; k and v of every layer read the encoder's output
    "t5": (tiny.t5, {frozenset({"q", "k", "v"}), frozenset({"k", "v"})}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_those_that_read_one_tensor(family):
    """Found at attach, and what a real pass shows."""
    build, expected = FAMILIES[family]
    model = randomised(build())
    assert short(groups(model)) == expected
    inputs: dict[int, set[str]] = {}
    alive = []

    def write_down(name):
        return lambda module, given: alive.append(given[0]) or inputs.setdefault(id(given[0]), set()).add(name)

    for name, layer in layers_of(model).items():
        layer.register_forward_pre_hook(write_down(name))
    ids = tiny.token_ids()
    model(ids, **({"labels": ids} if family == "t5" else {}))
    assert groups(model) == {frozenset(names) for names in inputs.values() if len(names) > 1}


def test_the_watched_pass_leaves_no_trace():
    """Neither the model's state, nor its hooks, nor the random generator see it."""
    model = tiny.gpt2().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.register_forward_hook(lambda *seen: pytest.fail("a hook was called"))
    state = torch.random.get_rng_state()
    join_readers(model, {})
    seen = _inputs(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [type(layer).__name__ for layer, _ in seen[:4]] == ["Conv1D"] * 4
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_can_not_be_watched_shares_nothing(caplog):
    model = tiny.llama()
    model.model.forward = None  # goes with the copy; the class's forward takes its place
    model.model.odd = (number for number in range(3))  # can't be copied
    with caplog.at_level(logging.INFO):
        del model.model.forward
        attach(model, LoraConfig(r=2))
    assert groups(model) == set() and "share no x A^T" in caplog.text
    assert groups(attach(tiny.resnet(), LoraConfig(r=2, target_modules=["convolution"]))) == set()


@pytest.mark.parametrize("family", ["llama", "bert", "gptj", "cohere", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_shared_equals_unshared(family, dtype, monkeypatch, wide):
    """Logits and gradients; products of another width may be rounded in another order."""
    build = {"bert": tiny.bert_classifier}.get(family) or FAMILIES[family][0]
    model = randomised(build().to(dtype))
    assert groups(model)
    ids = tiny.token_ids(rows=3)
    labels = torch.tensor([0, 1, 2]) if family == "bert" else ids
    found = []
    for shares in (True, False):
        if not shares:
            unshared(monkeypatch)
        model.zero_grad()
        output = model(ids, labels=labels)
        output.loss.backward()
        found.append([output.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 0.06}[dtype]
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max() + 1e-12


def test_the_product_is_computed_once(monkeypatch, wide):
    calls = []
    product = sharing._product
    monkeypatch.setattr(sharing, "_product", lambda x, down: calls.append(down.shape[0]) or product(x, down))
    model = randomised(tiny.llama())
    for number in range(2):
        calls.clear()
        model(tiny.token_ids(seed=number))
        assert calls == [12, 8] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant, wide):
    ids = tiny.token_ids()
    model = randomised(tiny.llama()).train()
    expected, exact = gradients(model, ids)
    if reentrant:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    else:
        enable_gradient_checkpointing(model)
    for _ in range(2):
        loss, found = gradients(model, ids)
        assert torch.equal(loss, expected)
        assert all(torch.allclose(found[name], exact[name], atol=1e-7) for name in exact)
    assert len(groups(model)) == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_is_drawn_again_alike_under_checkpointing(reentrant):
    ids = tiny.token_ids()
    model = randomised(tiny.llama(), lora_dropout=0.3).train()
    torch.manual_seed(3)
    expected, exact = gradients(model, ids)
    if reentrant:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    else:
        enable_gradient_checkpointing(model)
    torch.manual_seed(3)
    loss, found = gradients(model, ids)
    assert torch.equal(loss, expected)
    assert all(torch.allclose(found[name], exact[name], atol=1e-7) for name in exact)


def test_wide_numbers_are_read_alone(monkeypatch):
    model = randomised(tiny.llama())
    expected = model(tiny.token_ids()).logits
    unshared(monkeypatch)
    assert torch.equal(model(tiny.token_ids()).logits, expected)


def test_masks_are_drawn_for_each_layer():
    """As in PEFT: with dropout nothing is shared, and equal layers with equal inputs differ."""

    model = randomised(tiny.llama(), lora_dropout=0.5)
    block = model.model.layers[0].self_attn
    block.k_proj.load_state_dict(block.v_proj.state_dict())
    x = torch.randn(5, 32)
    assert torch.equal(block.k_proj(x), block.v_proj(x))
    block.train()
    assert not torch.equal(block.k_proj(x), block.v_proj(x))


def test_what_changes_between_two_readers_is_seen(wide):
    """The tensor written in place, the factors changed, another tensor: each layer then computes its own."""
    block = randomised(tiny.llama()).model.layers[0].self_attn
    q, k, v = block.q_proj, block.k_proj, block.v_proj

    def alone(layer, x):
        return layer.base(x) + layer.scale * (x @ layer.lora_A.T) @ layer.lora_B.T

    def right(layer, x):
        return torch.allclose(layer(x), alone(layer, x), atol=1e-5)

    with torch.no_grad():
        x = torch.randn(3, 32)
        assert right(q, x)
        x.add_(1.0)
        assert right(k, x)
        k.lora_A.mul_(2.0)
        assert right(v, x)
        assert right(v, torch.randn(3, 32))
        k.resize_(7)
        for layer in (v, v, k, q, q, v):
            assert right(layer, x)


def test_training_set_ranks_and_other_ranks_in_a_group(wide):
    """The plain formula is followed through steps, growth and shrinking; ranks of a group may differ."""
    model = randomised(tiny.llama(), rank_pattern={"k_proj": 7}).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    q = "model.layers.0.self_attn.q_proj"
    for number in range(6):
        if number in (2, 4):
            set_ranks(model, {q: 9 if number == 2 else 2}, optimizer=optimizer)
        ids = tiny.token_ids(seed=number)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            logits = model(ids).logits
            logits_again = model(ids).logits
            twin = copy.deepcopy(model)
            for layer in layers_of(twin).values():
                layer.base.weight.data = layer.merged_weight()
                layer.active = False
            assert torch.equal(logits, logits_again)
            assert torch.allclose(twin(ids).logits, logits, atol=1e-4)
    assert len(groups(model)) == 4


def test_nothing_of_a_step_stays_alive(wide):
    model = randomised(tiny.llama()).train()
    seen: list[weakref.ref[torch.Tensor]] = []
    for layer in layers_of(model).values():
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(weakref.ref(inputs[0])))
    ids = tiny.token_ids()
    for backward in (True, True, False):
        loss = model(ids, labels=ids).loss
        if backward:
            loss.backward()
        del loss
        assert seen and all(reference() is None for reference in seen)
        seen.clear()
    assert all(layer.readers is None or layer.readers._reading is None for layer in layers_of(model).values())
    layers = [weakref.ref(layer) for layer in layers_of(model).values()]
    del layer
    detach(model)
    gc.collect()
    assert all(reference() is None for reference in layers)


def test_copies_pickles_and_switches(wide):
    model = randomised(tiny.llama())
    ids = tiny.token_ids()
    expected = model(ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, expected)
        assert groups(twin) == groups(model) != set()
        own = set(layers_of(twin).values())
        assert all(set(layer.readers.layers) <= own for layer in own if layer.readers)
    base = tiny.llama()(ids).logits
    with disabled(model):
        assert torch.equal(model(ids).logits, base)
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
    with torch.inference_mode():
        assert torch.allclose(model(ids).logits, expected, atol=1e-6)
    assert torch.equal(detach(model)(ids).logits, base)


def test_generation_is_the_merged_model_s(wide):
    from rankwise.attach.inject import merge_in

    model = randomised(tiny.llama())
    ids = tiny.token_ids(rows=1)
    found = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(found, merge_in(model).generate(ids, max_new_tokens=8, do_sample=False))


def test_weight_shared_layers(monkeypatch, wide):
    """ALBERT calls one layer many times in a pass."""
    import transformers

    config = transformers.AlbertConfig(
        vocab_size=300, embedding_size=16, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = randomised(transformers.AlbertModel(config).double()).train()
    ids = tiny.token_ids()
    assert frozenset({"query", "key", "value"}) in short(groups(model))
    found = {}
    for shares in (True, False):
        if not shares:
            unshared(monkeypatch)
        model.zero_grad()
        model(ids).last_hidden_state[..., :5].exp().sum().backward()
        found[shares] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found[True].keys() == found[False].keys()
    for name, grad in found[True].items():
        assert torch.allclose(grad, found[False][name], rtol=1e-5, atol=1e-6), name


def test_derived_is_made_again_when_a_source_changes():
    made = []
    derived, source = Derived(), nn.Parameter(torch.ones(2))

    def value():
        return derived.of((source,), lambda: made.append(1) or source.detach() * 2)

    assert value() is value() and len(made) == 1
    with torch.no_grad():
        source.add_(1)
    assert value()[0] == 4
    source.data = torch.full((2,), 5.0)
    assert value()[0] == 10
    source = nn.Parameter(torch.ones(2))
    assert value()[0] == 2
    x = torch.ones(2, requires_grad=True)

    def drop(grad):
        derived.drop()
        value()

    x.register_hook(drop)
    (x * 2).sum().backward()
    assert len(made) == 4, "kept until the backward pass has ended"
    value()
    assert len(made) == 5
    assert pickle.loads(pickle.dumps(derived))._made is None and copy.deepcopy(derived)._made is None


def test_an_optimiser_that_counts_no_versions_is_followed():
    """Some write the parameters through `data`, after the backward pass."""
    model = randomised(nn.Sequential(nn.Linear(6, 4).bfloat16()), target_modules=["0"]).train()
    x = torch.randn(3, 6).bfloat16()
    before = model(x)
    before.sum().backward()
    model[0].lora_B.data.mul_(3.0)
    after = model(x)
    base = model[0].base(x)
    assert torch.allclose((after - base).float(), 3 * (before - base).float(), rtol=0.1, atol=0.05)


def test_a_cast_is_made_once_for_a_pass_and_its_recomputation(monkeypatch):
    made = []
    stacked = sharing._stacked
    monkeypatch.setattr(sharing, "_stacked", lambda p, dtype: made.append(len(p)) or stacked(p, dtype))
    model = randomised(tiny.llama().bfloat16()).train()
    enable_gradient_checkpointing(model)
    ids = tiny.token_ids()
    model(ids, labels=ids).loss.backward()
    made.clear()
    model(ids, labels=ids).loss.backward()
    assert sorted(made) == sorted(2 * [*(7 * [1]), 1, 1, 3, 2]), "of a block: 7 of B, A of o and down, of two groups"


def test_what_was_used_in_a_block_is_forgotten_as_ever_after_it():
    """Used without a gradient in the block, then in passes outside: a fused step between them counts no versions."""
    model = randomised(tiny.llama().bfloat16()).train()  # few rows to evaluate would need no casts
    ids = tiny.token_ids()
    with torch.no_grad(), unchanging(), unchanging():
        model(ids)
    assert all(layer._derived[1]._made is not None for layer in layers_of(model).values())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    found = model(ids).logits
    for layer in layers_of(model).values():
        assert isinstance(layer, LowRankLayer)
        layer._derived[0].forget(), layer._derived[1].forget()
        if layer.readers is not None:
            layer.readers.derived.forget()
    assert torch.equal(found, model(ids).logits)


def test_passes_before_one_backward_pass_under_checkpointing() -> None:
    """A pass without gradients has left the norm; the first of two parts must not take it from the other."""
    model = tiny.llama()
    attach(model, LoraConfig(r=4, target_modules="all-linear", use_dora=True))
    enable_gradient_checkpointing(model)
    ids = tiny.token_ids()
    with torch.no_grad():
        model(ids)
    model.train()
    (model(ids).logits.sum() + model(ids[:1]).logits.sum()).backward()


@pytest.mark.parametrize("fused", [False, True])
def test_evaluation_between_steps_with_dropout_sees_the_new_factors(fused):
    """Dropout casts each A alone, evaluation all of a group together; a fused AdamW counts no versions."""
    model = randomised(tiny.llama().bfloat16(), lora_dropout=0.2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, fused=fused)
    ids = tiny.token_ids()
    for _ in range(2):
        with torch.no_grad():
            seen, wanted = (each.eval()(ids).logits for each in (model, copy.deepcopy(model)))
        assert torch.equal(seen, wanted)
        gradients(model.train(), ids)
        optimizer.step()
