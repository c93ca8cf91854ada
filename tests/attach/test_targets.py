"""Which layers get adapters, and the one line that says why a request selects none."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import attach, describe, merge_in, ranks
from rankwise.attach.targets import find_targets
from rankwise.attach.uncalled import ALWAYS_READ, READ_BY_KERNELS
from rankwise.errors import RequestError
from tests import tiny
from tests.attach.snapshots import assert_unchanged, snapshot

LAYER = "model.layers.{}.{}"
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def names(model: nn.Module, **options) -> list[str]:
    return [target.name for target in find_targets(model, LoraConfig(**options))]


def of_layers(parts: list[str], layers=(0, 1)) -> list[str]:
    return [LAYER.format(layer, part) for layer in layers for part in parts]


# --- what is selected ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj"]}, of_layers(["self_attn.q_proj"])),
        ({"target_modules": ["self_attn.q_proj", "up_proj"]}, of_layers(["self_attn.q_proj", "mlp.up_proj"])),
        ({"target_modules": [LAYER.format(1, "mlp.up_proj")]}, [LAYER.format(1, "mlp.up_proj")]),
        ({"target_modules": r".*\.(q|v)_proj"}, of_layers(["self_attn.q_proj", "self_attn.v_proj"])),
        ({"target_modules": r"model\.layers\.1\..*proj"}, of_layers([*ATTENTION, *MLP], [1])),
        ({"target_modules": "all-linear"}, of_layers([*ATTENTION, *MLP])),
        ({"target_modules": "ALL-LINEAR"}, of_layers([*ATTENTION, *MLP])),
        ({"target_modules": ["lm_head"]}, ["lm_head"]),
        ({"exclude_modules": ["mlp.gate_proj", "up_proj", "down_proj"]}, of_layers(ATTENTION)),
        ({"exclude_modules": [LAYER.format(0, "mlp.up_proj")], "target_modules": ["up_proj"]},
         [LAYER.format(1, "mlp.up_proj")]),
        ({"exclude_modules": r".*\.self_attn\..*"}, of_layers(MLP)),
        ({"exclude_modules": r".*layers\.0.*", "target_modules": ["q_proj"]}, of_layers(["self_attn.q_proj"], [1])),
        ({"layers_to_transform": 1, "target_modules": ["q_proj"]}, of_layers(["self_attn.q_proj"], [1])),
        ({"layers_to_transform": [0, 1], "target_modules": ["q_proj"]}, of_layers(["self_attn.q_proj"])),
        ({"layers_to_transform": [0], "layers_pattern": "layers", "target_modules": ["q_proj"]},
         of_layers(["self_attn.q_proj"], [0])),
        ({"layers_to_transform": [0], "layers_pattern": ["h", "layers"], "target_modules": ["q_proj"]},
         of_layers(["self_attn.q_proj"], [0])),
        ({"modules_to_save": ["mlp"]}, of_layers(ATTENTION)),
    ],
)  # fmt: skip
def test_selection(options, expected):
    assert sorted(names(tiny.llama(), **options)) == sorted(expected)


@pytest.mark.parametrize(
    ("build", "head"),
    [
        (tiny.llama, "lm_head"), (tiny.qwen, "lm_head"), (tiny.mistral, "lm_head"), (tiny.gemma3, "lm_head"),
        (tiny.gpt2, "lm_head"), (tiny.gptj, "lm_head"), (tiny.mixtral, "lm_head"), (tiny.t5, "lm_head"),
        (lambda: tiny.llama(tied=True), "lm_head"),
    ],
)  # fmt: skip
def test_all_linear_never_takes_the_output_head_unless_named(build, head):
    model = build()
    assert head not in names(model)
    assert names(model, target_modules=[head]) == [head]


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
def test_all_linear_leaves_a_classifier_to_its_task(task_type):
    model = attach(tiny.bert_classifier(), LoraConfig(task_type=task_type))
    assert "classifier" not in ranks(model)
    assert "classifier.weight" in dict(model.named_parameters())


def test_the_share_left_out_is_said(caplog):
    caplog.set_level("WARNING", logger="rankwise")
    model = tiny.mixtral()
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    routers = sum(p.numel() for n, p in model.named_parameters() if ".gate." in n or "router" in n)
    layers = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() > 1)
    attach(model, LoraConfig())
    found = describe(model)
    assert found["share_left_out"] == pytest.approx((experts + routers) / layers)
    assert found["share_left_out"] > 0.5
    assert any("experts" in name for name in found["largest_left_out"])
    assert "adapters leave out 8" in caplog.text and "experts" in caplog.text


def test_nothing_is_left_out_of_a_dense_model(caplog):
    caplog.set_level("INFO", logger="rankwise")
    model = attach(tiny.llama(), LoraConfig())
    assert describe(model)["share_left_out"] == 0.0
    assert "leave out" not in caplog.text


# --- ranks and alphas ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank_pattern", "expected"),
    [
        ({"q_proj": 2}, {0: 2, 1: 2}),
        ({r"layers\.0\..*q_proj": 2}, {0: 2, 1: 8}),
        ({r"model\.layers\.0\.self_attn\.q_proj": 2, "q_proj": 6}, {0: 2, 1: 6}),
        ({"q_proj": 6, r"model\.layers\.0\.self_attn\.q_proj": 2}, {0: 6, 1: 6}),  # the first that fits decides
        ({r"^model\.layers\.1\.self_attn\.q_proj": 3}, {0: 8, 1: 3}),
        ({r"self_attn\.q_proj|up_proj": 5}, {0: 5, 1: 5}),
    ],
)
def test_precedence_of_patterns_is_that_of_peft(rank_pattern, expected):
    options = {"r": 8, "target_modules": ["q_proj", "up_proj"], "rank_pattern": rank_pattern}
    mine = ranks(attach(tiny.llama(), LoraConfig(**options)))
    assert {layer: mine[LAYER.format(layer, "self_attn.q_proj")] for layer in (0, 1)} == expected
    theirs = peft.get_peft_model(tiny.llama(), peft.LoraConfig(**options))
    for name, module in theirs.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            assert mine[name.removeprefix("base_model.model.")] == module.r["default"]


def test_alpha_pattern_sets_the_scale():
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], alpha_pattern={r"layers\.0\..*": 2})
    targets = find_targets(tiny.llama(), config)
    assert [target.lora_alpha for target in targets] == [2, 8]
    model = attach(tiny.llama(), config)
    scales = [model.get_submodule(target.name).scale for target in targets]
    assert scales == [0.5, 2.0]


# --- what is refused -----------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Layers that can't be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.grouped = nn.Conv1d(8, 8, 3, groups=2)
        self.transposed = nn.ConvTranspose1d(8, 8, 3)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16)
        self.linear = nn.Linear(8, 8)


REFUSED = [
    (tiny.llama, {"target_modules": ["q_porj"]}, 
     "target_modules names 'q_porj', which matches no module; did you mean 'q_proj'"),
    (tiny.llama, {"target_modules": ["q_proj", "query"]}, "target_modules names 'query', which matches no module"),
    (tiny.gpt2, {"target_modules": ["c_atn"]}, "did you mean 'c_attn'"),
    (tiny.llama, {"target_modules": ["self_atn.q_proj"]}, "did you mean 'self_attn.q_proj'"),
    (tiny.llama, {"target_modules": r"q_proj"}, "expression 'q_proj' matches no module in full; did you mean"),
    (tiny.llama, {"target_modules": "all_linear"}, "expression 'all_linear' matches no module"),
    (tiny.llama, {"target_modules": "(q_proj"}, "target_modules '(q_proj' is not a regular expression"),
    (tiny.llama, {"target_modules": ["q_proj"], "exclude_modules": ["k_porj"]},
     "exclude_modules names 'k_porj', which matches no module; did you mean 'k_proj'"),
    (tiny.llama, {"exclude_modules": r".*k_porj"}, "exclude_modules expression '.*k_porj' matches no module"),
    (tiny.llama, {"exclude_modules": "[k_proj"}, "exclude_modules '[k_proj' is not a regular expression"),
    (tiny.llama, {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "selects no layer"),
    (tiny.llama, {"exclude_modules": ".*"}, "selects no layer"),
    (tiny.llama, {"target_modules": ["q_proj"], "rank_pattern": {"q_porj": 2}},
     "rank_pattern['q_porj'] matches no adapted layer; did you mean 'q_proj'"),
    (tiny.llama, {"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}}, "rank_pattern['k_proj'] matches no"),
    (tiny.llama, {"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 2}}, "alpha_pattern['v_proj'] matches no"),
    (tiny.llama, {"rank_pattern": {"(q": 2}}, "rank_pattern '(q' is not a regular expression"),
    (tiny.llama, {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
     "layers_to_transform names layer 2, which has no target; layers with one: 0, 1"),
    (tiny.llama, {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "block"},
     "has no target under layers_pattern='block'; layers with one: none"),
    (tiny.llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_hed"]},
     "modules_to_save names 'lm_hed', which matches no module; did you mean 'lm_head'"),
    (tiny.llama, {"target_modules": ["q_proj"], "modules_to_save": ["_proj"]},
     "q_proj' is in modules_to_save and in target_modules; choose one"),
    (tiny.llama, {"target_modules": ["q_proj"], "bias": "all"}, "bias='all' has no effect: no layer has a bias"),
    (tiny.qwen, {"target_modules": ["o_proj"], "bias": "lora_only"}, "no adapted layer has a bias; set bias='none'"),
    (tiny.llama, {"target_modules": ["q_proj"], "trainable_token_indices": [260]}, "must lie in 0 to 259, not [260]"),
    (tiny.llama, {"target_modules": ["q_proj"], "trainable_token_indices": [-1, 3]}, "must lie in 0 to 259, not [-1]"),
    (tiny.llama, {"target_modules": ["q_proj"], "trainable_token_indices": []}, "not an empty list"),
    (tiny.llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 3]}, "has 3 more than once"),
    (tiny.llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_token": [3]}},
     "names 'embed_token', which matches no module; did you mean 'embed_tokens'"),
    (tiny.llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3]}},
     "it must be an embedding"),
    (tiny.llama, {"target_modules": ["q_proj", "embed_tokens"], "trainable_token_indices": [3]},
     "is in target_modules and in trainable_token_indices; choose one"),
    (tiny.llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "trainable_token_indices": [3]},
     "is in modules_to_save and in trainable_token_indices; choose one"),
    (lambda: tiny.llama(tied=True), {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [3]},
     "'lm_head' is tied to 'model.embed_tokens'"),
    (lambda: tiny.llama(tied=True),
     {"target_modules": ["q_proj"], "trainable_token_indices": [3], "modules_to_save": ["lm_head"]},
     "'lm_head' is in modules_to_save and in trainable_token_indices (tied to the embedding); choose one"),
    (tiny.resnet, {"target_modules": ["convolution"], "trainable_token_indices": [3]}, "name the embedding instead"),
    (tiny.resnet, {"target_modules": ["convolution"], "use_dora": True}, "is a convolution: exclude it"),
    (tiny.t5, {"target_modules": ["shared", "q"]},
     "'shared' is never called, an adapter there would do nothing; target ['encoder.embed_tokens'"),
    (tiny.llama, {"target_modules": ["q_proj", "norm"]},
     "'model.norm' is a LlamaRMSNorm, which can't be adapted; target one of Linear"),
    (tiny.llama, {"target_modules": ["self_attn"]}, "is a LlamaAttention, which can't be adapted"),
    (tiny.llama, {"target_modules": ["q_proj", "k_proj"], "r": 64, "init_lora_weights": "pissa"},
     "init_lora_weights='pissa' takes r=64 directions from 'model.layers.0.self_attn.q_proj', which has 32"),
    (tiny.llama, {"target_modules": ["q_proj"], "r": 64, "init_lora_weights": "olora"}, "lower r or set rank_pattern"),
    (Odd, {"target_modules": ["linear", "norm"]}, "is a LayerNorm, which can't be adapted"),
    (Odd, {"target_modules": ["linear", "attention.out_proj"]}, "inside nn.MultiheadAttention"),
    (Odd, {"target_modules": ["grouped"]}, "is a grouped convolution (groups=2)"),
    (Odd, {"target_modules": ["transposed"]}, "is a ConvTranspose1d, which can't be adapted"),
    (Odd, {"target_modules": ["linear1"]}, "'encoder.linear1' is inside nn.TransformerEncoderLayer, whose fast path"),
    (Odd, {"target_modules": ["linear"], "trainable_token_indices": [1]}, "which Odd does not say it has"),
    (tiny.mamba, {"target_modules": ["dt_proj"]}, "mixer.dt_proj' can't be adapted: MambaMixer reads its weight and"),
    (tiny.mamba, {"target_modules": ["out_proj", "in_proj"]}, "on CUDA a fused kernel of MambaMixer reads its"),
    (lambda: nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)), {"target_modules": ["0"]}, "embedding with max_norm=1"),
    (tiny.llama, {"target_modules": ["q_proj"], "layers_to_transform": -1},
     "layers_to_transform names layer -1, which has no target; layers with one: 0, 1"),
    (lambda: torch.compile(tiny.llama()), {}, "this OptimizedModule is torch's wrapper around a model: give the model"),
    (lambda: nn.DataParallel(tiny.llama()), {}, "this DataParallel is torch's wrapper around a model: give the model"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "options", "message"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_refused_in_one_line_with_the_model_as_it_was(build, options, message):
    model = build().train()
    next(model.parameters()).requires_grad_(False)  # flags are put back as they were, not all alike
    before = snapshot(model)
    with pytest.raises(RequestError) as caught:
        attach(model, LoraConfig(**options))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive whole number, not 0"),
        ({"r": -4}, "not -4"),
        ({"lora_alpha": 0}, "lora_alpha must be above 0, not 0: at 0 the adapter can never change anything"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be above 0, not nan"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] must be a positive whole number, not 0; to leave a"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern['q_proj'] must be above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1, not 1.0"),
        ({"init_lora_weights": "pisa"}, "unknown init_lora_weights 'pisa'; did you mean 'pissa'?"),
        ({"init_lora_weights": "corda"}, "unknown init_lora_weights 'corda'"),
        ({"init_lora_weights": "pissa_niter_x"}, "iterations must be a positive whole number"),
        ({"init_lora_weights": "pissa", "init_scale": 2.0}, "init_scale has no effect"),
        ({"init_scale": 0.0}, "init_scale must be above 0"),
        ({"bias": "some"}, "unknown bias 'some'"),
        ({"task_type": "CAUSAL"}, "unknown task_type 'CAUSAL'; did you mean 'CAUSAL_LM'?"),
        ({"kind": "lorra"}, "unknown kind 'lorra'; did you mean 'lora'?"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern has no effect without layers_to_transform"),
        ({"target_modules": ["q"], "layers_to_transform": []}, "layers_to_transform is empty"),
        ({"layers_to_transform": [0]}, "layers_to_transform has no effect with target_modules='all-linear'"),
    ],
    ids=str,
)
def test_a_configuration_that_means_nothing(options, message):
    with pytest.raises(RequestError) as caught:
        LoraConfig(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_attached_again():
    model = attach(tiny.llama(), LoraConfig(r=2))
    before = snapshot(model)
    with pytest.raises(RequestError, match="attached to this LlamaForCausalLM already; detach or merge it first"):
        attach(model, LoraConfig(r=2))
    assert_unchanged(model, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inner", [False, True])
def test_a_model_of_peft(inner):
    wrapped = peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=["q_proj"]))
    model = wrapped.base_model.model if inner else wrapped
    before = snapshot(model)
    with pytest.raises(RequestError, match=r"holds PEFT layers; unload or merge them first \(model.unload\(\)\)"):
        attach(model, LoraConfig(r=2, target_modules=["k_proj"]))
    assert_unchanged(model, before)


def test_the_fast_path_of_torch_can_be_switched_off():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        attach(layer, LoraConfig(r=2, target_modules=["linear1"], init_lora_weights=False))
        with torch.no_grad():
            changed = layer(x)
            layer.linear1.active = False
            assert not torch.allclose(changed, layer(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.unchecked
@pytest.mark.parametrize("names", [{"q_proj", "v_proj"}, ("q_proj", "v_proj")], ids=["set", "tuple"])
def test_sets_and_tuples_are_lists(names, tmp_path):
    from rankwise.attach.checkpoint import load_adapter, save_adapter

    model = attach(tiny.llama(), LoraConfig(target_modules=names, modules_to_save=("lm_head",)))
    save_adapter(model, tmp_path / "a")
    assert sorted(load_adapter(tiny.llama(), tmp_path / "a").rankwise_attachment.config.target_modules) == sorted(names)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": "8"}, "r must be a positive whole number, not '8'"),
        ({"r": 2.5}, "r must be a positive whole number, not 2.5"),
        ({"r": True}, "r must be a positive whole number, not True"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be above 0, not inf"),
        ({"lora_alpha": "16"}, "lora_alpha must be above 0, not '16'"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names, not 'lm_head'"),
    ],
    ids=str,
)
def test_values_of_the_wrong_type_are_one_line(options, message):
    with pytest.raises(RequestError, match=message):
        LoraConfig(**options)


def test_attaching_around_or_inside_an_attached_model_is_refused():
    model = tiny.llama()
    attach(model.model, LoraConfig(r=2))
    with pytest.raises(RequestError, match="a part of this LlamaForCausalLM already"):
        attach(model, LoraConfig(r=2))


# --- layers that are read and never called -------------------------------------------------------------------------


def test_all_linear_leaves_out_what_mamba_reads_without_a_call():
    """An adapter on dt_proj got no gradient, and merging it changed the outputs all the same."""
    model = attach(tiny.mamba(), LoraConfig(r=2, init_lora_weights=False))
    assert set(ranks(model)) == {f"backbone.layers.{i}.mixer.in_proj" for i in range(2)}
    out = model(input_ids=tiny.token_ids()).logits
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert torch.allclose(merge_in(model)(input_ids=tiny.token_ids()).logits, out, atol=1e-5)


def test_layers_that_are_never_called_are_read_where_the_tables_say():
    """In transformers' own sources, so that a new version that renames them is noticed."""
    families = [
        "bamba", "conditional_detr", "dab_detr", "detr", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba",
        "layoutlmv2", "longcat_flash", "mamba", "mamba2", "maskformer", "mobilebert", "nemotron_h", "neomme",
        "wav2vec2", "wavlm", "zamba2",
    ]  # fmt: skip
    folder = Path(transformers.models.__file__).parent
    sources = "\n".join((folder / family / f"modeling_{family}.py").read_text() for family in families)
    classes = {match[1]: match.start() for match in re.finditer(r"^class (\w+)\(", sources, re.MULTILINE)}
    for owner, leaves in [*ALWAYS_READ.items(), *READ_BY_KERNELS.items()]:
        body = re.split(r"^class ", sources[classes[owner] + 1 :], maxsplit=1, flags=re.MULTILINE)[0]
        for leaf in leaves:
            assert f"self.{leaf}.weight" in body, f"{owner}.{leaf}"


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": "0.1"}, "lora_dropout must be a number, not '0.1'"),
        ({"lora_dropout": None}, "lora_dropout must be a number, not None"),
        ({"use_rslora": "false"}, "use_rslora must be true or false, not 'false'"),
        ({"use_dora": 1}, "use_dora must be true or false, not 1"),
        ({"init_lora_weights": None}, "init_lora_weights must be true or false or text, not None"),
        ({"rank_pattern": None}, "rank_pattern must be a mapping, each value a whole number, not None"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be a mapping"),
        ({"target_modules": [1]}, "target_modules must be text or a list, each item text, not [1]"),
        ({"trainable_token_indices": ["a"]}, "trainable_token_indices must be a list, each item a whole number or a"),
        ({"target_modules": ["q"], "layers_to_transform": "0"}, "layers_to_transform must be a whole number or a list"),
        ({"target_modules": ["q"], "layers_to_transform": 1.0}, "layers_to_transform must be a whole number or a list"),
    ],
    ids=str,
)
def test_values_of_another_type(options, message):
    with pytest.raises(RequestError) as caught:
        LoraConfig(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# --- what is given -------------------------------------------------------------------------------------------------


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            (tiny.llama, peft.LoraConfig(r=2)),
            "attach takes rankwise's own LoraConfig, not peft.tuners.lora.",
        ),
        ((tiny.llama, {"r": 2}), "attach takes rankwise's own LoraConfig, not dict"),
        ((lambda: "gpt2", LoraConfig()), "attach takes a model, not 'gpt2'; load it first"),
    ],
    ids=["config-of-peft", "dict", "name"],
)
def test_what_is_no_model_or_no_configuration(given, message):
    build, config = given
    with pytest.raises(RequestError) as caught:
        attach(build(), config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrapper_is_told_from_a_model_without_an_adapter():
    model = attach(tiny.llama(), LoraConfig(r=2))
    with pytest.raises(RequestError, match=r"wrapper around a model: give the model inside, \._orig_mod"):
        ranks(torch.compile(model))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8])
@pytest.mark.unchecked
def test_merging_into_what_is_no_floating_dtype(dtype):
    model = attach(tiny.llama(), LoraConfig(r=2))
    before = snapshot(model)
    with pytest.raises(RequestError, match=r"give one such as torch\.bfloat16"):
        merge_in(model, dtype=dtype)
    assert_unchanged(model, before)
