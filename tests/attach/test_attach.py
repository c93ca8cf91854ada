"""An attached model: the same object and class, only the adapter learns, and everything can be taken back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import adapter_parameters, attach, detach, disabled, is_attached, merge_in, ranks
from rankwise.errors import RequestError
from tests import tiny
from tests.attach.attached_cases import EVERYTHING, IDS, Build, Shared, attached, inputs_of, pixels, tied
from tests.attach.peft_cases import randomise
from tests.attach.snapshots import assert_unchanged, logits, relative, snapshot

FAMILIES: dict[str, tuple[Build, dict[str, Tensor], str | list[str]]] = {
    **{name: (build, {"input_ids": IDS, "labels": IDS}, "all-linear") for name, build in tiny.CAUSAL_LMS.items()},
    "bert": (tiny.bert_classifier, {"input_ids": IDS, "labels": torch.tensor([0, 2])}, "all-linear"),
    "t5": (tiny.t5, {"input_ids": IDS, "labels": tiny.token_ids(seed=1)}, "all-linear"),
    "resnet": (tiny.resnet, {"pixel_values": pixels(), "labels": torch.tensor([0, 2])}, ["convolution"]),
}
families = pytest.mark.parametrize("family", FAMILIES)

everything = pytest.mark.parametrize("what", EVERYTHING)


# --- in place ------------------------------------------------------------------------------------------------------


@families
def test_in_place_and_of_the_same_class(family):
    build, _, targets = FAMILIES[family]
    model = build()
    cls, parts = type(model), dict(model.named_modules())
    assert attach(model, LoraConfig(r=2, target_modules=targets)) is model
    assert type(model) is cls and is_attached(model)
    adapted = ranks(model)
    assert adapted and set(adapted.values()) == {2}
    for name, module in parts.items():
        if name in adapted:
            assert model.get_submodule(name).base is module
        else:
            assert model.get_submodule(name) is module


def test_generate_works_for_each_causal_family(causal_lm):
    prompt = IDS[:, :5]
    plain = causal_lm.generate(prompt, max_new_tokens=6, do_sample=False)
    attach(causal_lm, LoraConfig(r=4))
    assert torch.equal(causal_lm.generate(prompt, max_new_tokens=6, do_sample=False), plain)
    with torch.no_grad():
        for parameter in adapter_parameters(causal_lm).values():
            parameter.normal_(std=0.5)
    adapted = causal_lm.generate(prompt, max_new_tokens=6, do_sample=False)
    assert adapted.shape[0] == 2 and adapted.shape[1] > 5
    assert adapted.shape != plain.shape or not torch.equal(adapted, plain)
    with disabled(causal_lm):
        assert torch.equal(causal_lm.generate(prompt, max_new_tokens=6, do_sample=False), plain)


# --- only the adapter learns ---------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_only_the_adapter_learns(family, checkpointing):
    build, batch, targets = FAMILIES[family]
    if checkpointing and family == "resnet":
        pytest.skip("transformers has no checkpointing for ResNet")
    model = attach(build(), LoraConfig(r=2, target_modules=targets, lora_dropout=0.1)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    trained = {id(p): name for name, p in adapter_parameters(model).items()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # the factor whose partner is zero moves in the second step
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if id(parameter) in trained:
            assert parameter.grad is not None and not torch.equal(parameter, before[name]), name
        else:
            assert parameter.grad is None and torch.equal(parameter, before[name]), name
    assert {id(p) for p in optimizer.state} == set(trained)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    found = []
    for checkpointing in (False, True):
        model = attach(tiny.llama(), LoraConfig(r=2), generator=torch.Generator().manual_seed(0))
        randomise(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({name: p.grad for name, p in adapter_parameters(model).items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@everything
def test_only_what_was_asked_for_learns(what):
    """Biases, whole modules and token rows too; the base's own tensors, which wait aside, take no gradient."""
    model = attached(what).train()
    trained = {id(p) for p in adapter_parameters(model).values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    out = model(**inputs_of(model))
    out[0].square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (id(parameter) in trained) or parameter.grad is None, name
    assert all(p.grad is not None for name, p in adapter_parameters(model).items() if "original" not in name)


def test_a_step_moves_token_rows_and_no_other_row():
    model = attach(tied(), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 60])).train()
    embedding = model.model.embed_tokens
    before = embedding.merged_weight().clone()
    optimizer = torch.optim.SGD(adapter_parameters(model).values(), lr=1.0)
    model(**inputs_of(model), labels=IDS).loss.backward()
    optimizer.step()
    moved = (embedding.merged_weight() != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == [3, 60]
    assert torch.equal(model.lm_head.merged_weight(), embedding.merged_weight())


def test_dropout_is_repeated_by_a_seed_and_off_in_eval():
    model = attach(tiny.llama(), LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False))
    model.train()
    outputs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        outputs.append(logits(model, input_ids=IDS))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    model.eval()
    assert torch.equal(logits(model, input_ids=IDS), logits(model, input_ids=IDS))


def test_a_generator_repeats_the_start_and_spares_the_global_one():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    twins = [attach(tiny.llama(), LoraConfig(r=4), generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(torch.rand(1), expected)
    first, second = (adapter_parameters(model) for model in twins)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bias_lora_only_trains_the_adapted_layers_biases():
    model = attach(tiny.qwen(), LoraConfig(r=2, target_modules=["q_proj", "o_proj"], bias="lora_only"))
    biases = {name for name in adapter_parameters(model) if name.endswith("bias")}
    assert biases == {f"model.layers.{layer}.self_attn.q_proj.bias" for layer in (0, 1)}


def test_bias_all_trains_every_bias():
    plain = tiny.gpt2()
    expected = {name for name, _ in plain.named_parameters() if name.endswith(".bias")}
    model = attach(plain, LoraConfig(r=2, target_modules=["c_attn"], bias="all"))
    assert {name for name in adapter_parameters(model) if name.endswith("bias")} == expected


# --- disabled, detach ----------------------------------------------------------------------------------------------


@everything
def test_disabled_is_the_base_to_the_last_bit_and_nests(what):
    plain = EVERYTHING[what][0]()
    base = logits(plain, **inputs_of(plain))
    model = attached(what)
    adapted = logits(model, **inputs_of(model))
    assert not torch.equal(adapted, base)
    with disabled(model):
        assert torch.equal(logits(model, **inputs_of(model)), base)
        with disabled(model):
            assert torch.equal(logits(model, **inputs_of(model)), base)
        assert torch.equal(logits(model, **inputs_of(model)), base)
    assert torch.equal(logits(model, **inputs_of(model)), adapted)
    with pytest.raises(ZeroDivisionError), disabled(model):
        1 / 0  # noqa: B018
    assert torch.equal(logits(model, **inputs_of(model)), adapted)


@everything
def test_what_can_be_asked_inside_disabled(what):
    model = attached(what)
    before = {name: tensor.clone() for name, tensor in adapter_parameters(model).items()}
    with disabled(model):
        inside = adapter_parameters(model)
        assert before.keys() == inside.keys()
        assert all(torch.equal(before[name], inside[name]) for name in before)
        for action in (detach, merge_in):
            with pytest.raises(RequestError, match="inside `disabled`; leave the block first"):
                action(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter_parameters(model).items())


@everything
def test_detach_gives_the_same_objects_and_flags_back(what):
    build, options = EVERYTHING[what]
    model = build()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    attach(model, LoraConfig(**{"r": 4, **options}))
    randomise(model)
    assert detach(model) is model
    assert not is_attached(model) and "save_pretrained" not in vars(model)
    assert_unchanged(model, before)
    attach(model, LoraConfig(**{"r": 4, **options}))  # and again


def test_without_an_adapter():
    model = tiny.llama()
    for action in (detach, merge_in, ranks, adapter_parameters):
        with pytest.raises(
            RequestError, match=r"no adapter is attached to this LlamaForCausalLM; call rankwise.attach"
        ):
            action(model)
    with pytest.raises(RequestError, match="no adapter is attached"), disabled(model):
        pass


# --- copies, dtypes ------------------------------------------------------------------------------------------------


@everything
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_is_attached_and_apart(what, how, tmp_path):
    model = attached(what)
    expected = logits(model, **inputs_of(model))
    twin = how(model)
    assert torch.equal(logits(twin, **inputs_of(twin)), expected)
    randomise(twin, seed=1)
    changed = logits(twin, **inputs_of(twin))
    assert not torch.equal(changed, expected)
    assert torch.equal(logits(model, **inputs_of(model)), expected)
    twin.save_pretrained(tmp_path / "twin")  # writes the twin's adapter, not the original's
    assert {file.name for file in (tmp_path / "twin").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    from rankwise.attach.checkpoint import load_adapter

    plain = EVERYTHING[what][0]()
    base = logits(plain, **inputs_of(plain))
    assert relative(logits(load_adapter(plain, tmp_path / "twin"), **inputs_of(plain)), changed) < 1e-5
    detach(twin)
    assert torch.equal(logits(twin, **inputs_of(twin)), base)
    assert torch.equal(logits(model, **inputs_of(model)), expected)


@everything
def test_another_dtype(what):
    model = attached(what)
    if model.config.model_type == "resnet":
        pytest.skip("pixels are fp32")
    expected = logits(model, **inputs_of(model))
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}  # the waiting originals move along
    assert relative(logits(model, **inputs_of(model)).float(), expected) < 1e-4
    with disabled(model):
        assert logits(model, **inputs_of(model)).dtype == torch.float64


@pytest.mark.parametrize("build", [tiny.gemma3, tiny.llama, tied], ids=["scaled", "plain", "tied"])
@pytest.mark.parametrize("how", ["cast", "loaded", "parameters"])
def test_fresh_token_rows_are_the_base_in_bf16(build, how, tmp_path):
    """Gemma scales its embeddings by a number that bf16 rounds; the last way keeps its buffer in fp32."""
    model = build()
    if how == "cast":
        model.bfloat16()
    elif how == "loaded":
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    else:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    base = logits(model, input_ids=IDS)
    attach(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=sorted({int(i) for i in IDS[0]})))
    embedded = model.model.embed_tokens(IDS)
    with disabled(model):
        assert torch.equal(embedded, model.model.embed_tokens(IDS))
    assert relative(logits(model, input_ids=IDS).float(), base.float()) < 0.01


# --- what transformers does to a model -----------------------------------------------------------------------------

TIES = {
    **{name: (build, {"target_modules": "all-linear"}) for name, build in tiny.CAUSAL_LMS.items()},
    **{f"{name}-head": (build, {"target_modules": ["lm_head"]}) for name, build in tiny.CAUSAL_LMS.items()},
    "tied-whole-head": (tied, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied-embedding": (tied, {"target_modules": ["embed_tokens"]}),
    "tied-rows": (tied, {"target_modules": ["q_proj"], "trainable_token_indices": [3]}),
    "t5": (tiny.t5, {}),
    "t5-embeddings": (tiny.t5, {"target_modules": ["embed_tokens", "lm_head"]}),
    "t5-rows": (tiny.t5, {"target_modules": ["q"], "trainable_token_indices": [3]}),
    "bert": (tiny.bert, {}),
    "resnet": (tiny.resnet, {"target_modules": ["convolution"]}),
}


@pytest.mark.parametrize("case", TIES)
def test_tying_weights_again_does_no_harm(case):
    build, options = TIES[case]
    model = attach(build(), LoraConfig(**{"r": 2, **options}))
    randomise(model)
    before = snapshot(model)
    model.tie_weights()
    assert_unchanged(model, before)
    plain = detach(model)
    plain.tie_weights()
    assert torch.equal(logits(plain, **inputs_of(plain)), logits(build(), **inputs_of(plain)))


def test_resizing_the_vocabulary_is_refused():
    model = attach(tiny.llama(), LoraConfig(r=2))
    before = snapshot(model)
    with pytest.raises(RequestError, match=r"resize_token_embeddings\(300\) on an attached model .* detach, resize"):
        model.resize_token_embeddings(300)
    with pytest.raises(RequestError, match="would replace adapted layers"):
        model.resize_token_embeddings(300, mean_resizing=False)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert_unchanged(model, before)
    detach(model).resize_token_embeddings(300)
    assert model.config.vocab_size == 300


def test_a_layer_in_several_places_has_one_adapter():
    model, x = Shared(), torch.randn(4, 6)
    base = model(x)
    before = snapshot(model)
    attach(model, LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    assert model.first is model.rest[0] and model.first is model.rest[1][0]
    assert isinstance(model.first, AdapterLayer) and list(ranks(model)) == ["first"]
    changed = model(x)
    assert not torch.equal(changed, base)
    with disabled(model):
        assert torch.equal(model(x), base)
    twin = merge_in(copy.deepcopy(model))
    assert twin.first is twin.rest[1][0] and relative(twin(x), changed) < 1e-5
    detach(model)
    assert_unchanged(model, before)


@pytest.mark.unchecked
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_compiled_gives_the_same_output(options, backend):
    model = attach(tiny.llama(), LoraConfig(r=4, **options))
    randomise(model)
    expected = logits(model, input_ids=IDS)
    compiled = torch.compile(model, backend=backend)
    assert relative(logits(compiled, input_ids=IDS), expected) < 1e-5
    assert relative(logits(compiled, input_ids=IDS), expected) < 1e-5
