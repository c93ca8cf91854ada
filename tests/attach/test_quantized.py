"""Adapters on a base in 8 and 4 bits, loaded with bitsandbytes: attached, against PEFT, merged, detached."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from rankwise import quantized
from rankwise.adapters.config import LoraConfig
from rankwise.attach.checkpoint import load_adapter, load_native_state, native_state, save_adapter
from rankwise.attach.inject import adapter_parameters, attach, describe, detach, disabled, merge_in, ranks
from rankwise.errors import RequestError
from tests import bits, tiny
from tests.attach.peft_cases import randomise
from tests.attach.snapshots import assert_unchanged, logits, relative, snapshot
from tests.bits import STORAGES, bitsandbytes

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = {"input_ids": tiny.token_ids()}
EVERY = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}

FAMILIES: dict[str, tuple[Callable[[str], PreTrainedModel], dict[str, torch.Tensor], dict[str, object]]] = {
    "llama": (bits.llama, IDS, {}),
    "gpt2": (bits.gpt2, IDS, {}),
    "t5": (bits.t5, {**IDS, "decoder_input_ids": tiny.token_ids(seed=1)}, {"task_type": "SEQ_2_SEQ_LM"}),
    "bert": (bits.bert_classifier, IDS, {"task_type": "SEQ_CLS"}),
}
families = pytest.mark.parametrize("family", FAMILIES)
storages = pytest.mark.parametrize("storage", STORAGES)


def attached(storage: str, **options: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = attach(bits.llama(storage), LoraConfig(**{**EVERY, **options}))  # type: ignore[arg-type]
    randomise(model)
    return model


def quantised_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if quantized.is_quantized(module)}


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with plain layers, in place."""
    for name, module in quantised_layers(model).items():
        model.set_submodule(name, quantized.plain_layer(module, quantized.dense_weight(module)))
    quantized.forget_quantization(model)
    return model


# --- in place ------------------------------------------------------------------------------------------------------


@families
@storages
def test_a_fresh_adapter_changes_nothing(family, storage):
    build, inputs, options = FAMILIES[family]
    model = build(storage)
    quantized.keep_unpacked(model)  # else bitsandbytes computes this in bf16, or fails on widths it can't pack
    wanted = {mode: logits(model.train(mode), **inputs) for mode in (True, False)}
    attach(model, LoraConfig(**{**EVERY, **options}))
    assert {name.removesuffix(".base") for name in quantised_layers(model)} <= ranks(model).keys()
    for mode in (True, False):
        assert relative(logits(model.train(mode), **inputs), wanted[mode]) < 1e-6
    with disabled(model):
        assert torch.equal(logits(model, **inputs), wanted[False])


@storages
def test_all_linear_is_what_it_is_on_the_plain_model(storage):
    assert ranks(attached(storage)) == ranks(attach(tiny.llama(), LoraConfig(**EVERY)))
    assert describe(attached(storage))["share_left_out"] == 0.0


@storages
def test_counts_are_of_numbers_not_of_bytes(storage):
    plain = attach(tiny.llama(hidden_size=64, intermediate_size=128), LoraConfig(**EVERY, exclude_modules=["q_proj"]))
    model = attached(storage, exclude_modules=["q_proj"])
    assert describe(model) == describe(plain)


@families
@storages
def test_only_the_adapter_gets_gradients_and_they_are_fp32(family, storage):
    build, inputs, options = FAMILIES[family]
    model = attach(build(storage), LoraConfig(**{**EVERY, **options})).train()
    out = model(**inputs)
    out.logits.square().mean().backward()
    trained = adapter_parameters(model)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == any(parameter is own for own in trained.values()), name
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained.values() if p.is_floating_point())


@storages
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_around_it(storage, dtype):
    if dtype == torch.float16 and storage != "8bit":
        pytest.skip("fp16 is tried with 8 bits")
    model = attach(bits.llama(storage, dtype), LoraConfig(**EVERY)).train()
    model(**IDS).logits.float().mean().backward()
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert all(torch.isfinite(p.grad).all() for p in adapter_parameters(model).values())


def test_evaluation_in_between_changes_no_gradient():
    """bitsandbytes' repacking would: after it no gradient reaches the layers below."""
    model = attached("nf4", target_modules=["q_proj", "down_proj"])

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(**IDS).logits.square().mean().backward()
        return [p.grad.clone() for p in adapter_parameters(model).values()]

    before = gradients()
    logits(model.eval(), **IDS)
    with disabled(model):
        logits(model, **IDS)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


@pytest.mark.skipif(not bits.packs_for_cpu(), reason="this CPU has no bf16 instructions to pack for")
def test_a_model_that_was_evaluated_before_is_unpacked():
    model = bits.llama("nf4")
    before = logits(model, **IDS)
    assert any(m.weight.quant_state.packing_format_for_cpu for m in quantised_layers(model).values())
    attach(model, LoraConfig(**EVERY))
    assert relative(logits(model, **IDS), before) < 0.05, "packed, bitsandbytes computes in bf16"
    model.train()
    model(**IDS).logits.square().mean().backward()
    detach(model)
    assert all(m.support_avx512bf16_for_cpu for m in quantised_layers(model).values()), "as it was"


@pytest.mark.skipif(not bits.packs_for_cpu(), reason="this CPU has no bf16 instructions to pack for")
def test_a_refused_attach_leaves_what_bitsandbytes_packed_usable():
    model = bits.llama("nf4")
    before = logits(model, **IDS)
    with pytest.raises(RequestError):
        attach(model, LoraConfig(r=2, target_modules=["nowhere"]))
    assert all(m.support_avx512bf16_for_cpu for m in quantised_layers(model).values())
    assert relative(logits(model, **IDS), before) < 0.05


@storages
def test_gradient_checkpointing_gives_the_same_gradients(storage):
    def gradients(recompute: bool) -> list[torch.Tensor]:
        model = attached(storage).train()
        if recompute:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model(**IDS).logits.square().mean().backward()
        return [p.grad for p in adapter_parameters(model).values()]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


@storages
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"use_rslora": True}])
def test_gradients_are_those_of_the_dequantised_model(storage, options):
    model = attached(storage, **options).train()
    dense = dequantised(detach(copy.deepcopy(model)))
    attach(dense, LoraConfig(**{**EVERY, **options})).train()
    load_native_state(dense, native_state(model))
    for one in (model, dense):
        one(**IDS).logits.square().mean().backward()
    assert relative(logits(model, **IDS), logits(dense, **IDS)) < 1e-5
    wanted = adapter_parameters(dense)
    for name, parameter in adapter_parameters(model).items():
        assert relative(parameter.grad, wanted[name].grad) < 1e-4, name


# --- against PEFT --------------------------------------------------------------------------------------------------


def with_peft(model: PreTrainedModel, folder) -> peft.PeftModel:
    other = peft.PeftModel.from_pretrained(model, folder)
    quantized.keep_unpacked(other)
    return other


@families
@storages
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_peft_computes_the_same_with_the_same_adapter(family, storage, dora, tmp_path):
    build, inputs, options = FAMILIES[family]
    mine = build(storage)
    quantized.keep_unpacked(mine)
    theirs = copy.deepcopy(mine)
    modes = (True, False)
    if dora and storage == "8bit":  # PEFT 0.21's DoRA loses an 8-bit layer's scales on a CPU: it gets the same numbers
        theirs, modes = dequantised(theirs), (True,)
    attach(mine, LoraConfig(**{**EVERY, **options}, use_dora=dora))
    randomise(mine)
    save_adapter(mine, tmp_path / "mine")
    other = with_peft(theirs, tmp_path / "mine")
    for mode in modes:
        assert relative(logits(mine.train(mode), **inputs), logits(other.train(mode), **inputs)) < 1e-5
    with disabled(mine):
        base = logits(mine, **inputs)
    assert relative(logits(mine, **inputs), base) > 1e-3


@storages
def test_we_read_what_peft_trained_on_the_same_base(storage, tmp_path):
    base = bits.llama(storage)
    other = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**EVERY))
    randomise(other)
    quantized.keep_unpacked(other)
    other.save_pretrained(tmp_path / "theirs")
    mine = load_adapter(base, tmp_path / "theirs")
    for mode in (True, False):
        assert relative(logits(mine.train(mode), **IDS), logits(other.train(mode), **IDS)) < 1e-5


@storages
def test_the_folder_is_that_of_a_plain_base(storage, tmp_path):
    model = attached(storage)
    save_adapter(model, tmp_path / "a")
    plain = load_adapter(tiny.llama(hidden_size=64, intermediate_size=128, initializer_range=0.1), tmp_path / "a")
    assert ranks(plain) == ranks(model)
    for name, tensor in native_state(plain).items():
        assert torch.equal(tensor, native_state(model)[name])


# --- merged and detached -------------------------------------------------------------------------------------------


@families
@storages
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merged_is_a_plain_model_that_does_the_same(family, storage, dora, tmp_path):
    build, inputs, options = FAMILIES[family]
    model = build(storage)
    left_out = r".*\.(v_proj|c_attn|v|key)"
    attach(model, LoraConfig(**{**EVERY, **options}, use_dora=dora, exclude_modules=left_out))
    randomise(model)
    wanted = logits(model.train(), **inputs)
    merged = merge_in(model)
    assert merged is model and not quantised_layers(model)
    assert relative(logits(model, **inputs), wanted) < 1e-5
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    again = type(model).from_pretrained(tmp_path / "merged").train()
    assert relative(logits(again, **inputs), wanted) < 1e-5
    assert not any(isinstance(m, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)) for m in again.modules())


@storages
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_merged_dtype(storage, dtype):
    model = merge_in(attach(bits.llama(storage, torch.bfloat16), LoraConfig(**EVERY)), dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.bfloat16}
    model(**IDS)


@storages
def test_detached_is_the_quantised_model_again(storage):
    model = bits.llama(storage)
    quantized.keep_unpacked(model)
    wanted = logits(model, **IDS)
    before = snapshot(model)
    attach(model, LoraConfig(**EVERY))
    randomise(model)
    assert not torch.equal(logits(model, **IDS), wanted)
    detach(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, **IDS), wanted)


@storages
def test_copies_are_their_own(storage):
    model = attached(storage)
    other = copy.deepcopy(model)
    wanted = logits(model, **IDS)
    assert torch.equal(logits(other, **IDS), wanted)
    with torch.no_grad():
        for parameter in adapter_parameters(other).values():
            parameter.zero_()
    assert torch.equal(logits(model, **IDS), wanted) and not torch.equal(logits(other, **IDS), wanted)


# --- starts and ranks ----------------------------------------------------------------------------------------------


@storages
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "gaussian", "orthogonal"])
def test_starts_read_the_dequantised_weight(storage, start):
    model = bits.llama(storage)
    quantized.keep_unpacked(model)
    wanted = logits(model, **IDS)
    attach(model, LoraConfig(**EVERY, init_lora_weights=start))
    assert torch.equal(logits(model, **IDS), wanted)
    layer = model.model.layers[0].self_attn.q_proj
    if start == "pissa":
        best = torch.linalg.svd(quantized.dense_weight(layer.base)).S[:4]
        assert torch.allclose(torch.linalg.svd(layer.scale * layer.lora_B @ layer.lora_A).S[:4], best, rtol=1e-4)


@storages
def test_ranks_change_in_place(storage):
    model = attached(storage)
    layer = model.model.layers[0].mlp.down_proj
    before = logits(model, **IDS)
    assert layer.resize_(7) == 0.0 and relative(logits(model, **IDS), before) < 1e-5
    assert 0 < layer.resize_(2) < 1


# --- refused -------------------------------------------------------------------------------------------------------


def refused(model: PreTrainedModel, message: str, **options: object) -> None:
    before = snapshot(model)
    with pytest.raises(RequestError, match=message):
        attach(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options}))  # type: ignore[arg-type]
    assert_unchanged(model, before)


def test_a_quantised_module_is_not_trained_whole():
    message = r"modules_to_save names 'model.layers.0.mlp', .*_proj.weight' is stored in 8bit and can't be trained"
    refused(bits.llama("8bit"), message, modules_to_save=["0.mlp"])  # fmt: skip


def test_layers_in_other_storage_are_named():
    model = tiny.llama()
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(
        torch.ones(32, 32).to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(RequestError, match=r"'model.layers.1.self_attn.q_proj' \(Linear\) is stored as torch.float8"):
        attach(model, LoraConfig(r=2, target_modules=["q_proj"]))


def test_heads_and_embeddings_stay_plain_and_can_be_adapted():
    model = bits.llama("nf4")
    assert type(model.lm_head) is nn.Linear and type(model.get_input_embeddings()) is nn.Embedding
    attach(model, LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"], trainable_token_indices=None))
    model.train()(**IDS).logits.mean().backward()
    other = attach(bits.llama("nf4"), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 60],
                                                 modules_to_save=["lm_head"]))  # fmt: skip
    other.train()(**IDS).logits.mean().backward()


# --- transformers' Trainer -----------------------------------------------------------------------------------------


@storages
def test_trainer_trains_an_attached_model_and_refuses_a_bare_one(storage, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny.token_ids(rows=8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to=[], disable_tqdm=True, save_steps=3, logging_steps=3,
    )  # fmt: skip
    model = bits.llama(storage)
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    attach(model, LoraConfig(**EVERY))
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert all(not torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())
    assert {file.name for file in (tmp_path / "checkpoint-3").glob("*.safetensors")} == {"adapter_model.safetensors"}
    fresh = load_adapter(bits.llama(storage), tmp_path / "checkpoint-3")
    assert relative(logits(fresh.eval(), **IDS), logits(model.eval(), **IDS)) < 1e-5
    detach(model)
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=model, args=arguments, train_dataset=rows)
