"""A folder that disagrees with its configuration or the model is refused; what PEFT lets stand is not."""

from __future__ import annotations

import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file

from rankwise.adapters.config import LoraConfig
from rankwise.attach.checkpoint import load_adapter, save_adapter
from rankwise.attach.inject import attach, detach, is_attached
from rankwise.errors import RequestError
from tests import tiny
from tests.attach.attached_cases import IDS
from tests.attach.folders import CONFIG, WEIGHTS, edit_config, edit_weights, saved
from tests.attach.peft_cases import randomise
from tests.attach.snapshots import assert_unchanged, logits, relative, snapshot

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def _nan(tensors):
    tensors[f"{Q}.lora_A.weight"][0, 0] = float("nan")


def _inf(tensors):
    tensors[f"{Q}.lora_B.weight"][0, 0] = float("inf")


def _narrow(tensors):
    tensors[f"{Q}.lora_A.weight"] = tensors[f"{Q}.lora_A.weight"][:, :5].contiguous()


def _rename(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)


def _torn(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _pickle_only(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


BROKEN = {
    "missing": (lambda f: edit_weights(f, lambda t: t.pop(f"{Q}.lora_B.weight")),
                "lacks model.layers.0.self_attn.q_proj.lora_B.weight, which its configuration asks for in this model"),
    "unexpected": (lambda f: edit_weights(f, lambda t: t.update({f"{Q}.lora_C": torch.zeros(1)})),
                   "holds model.layers.0.self_attn.q_proj.lora_C, which its configuration has no place for"),
    "shape": (lambda f: edit_weights(f, _narrow),
              "model.layers.0.self_attn.q_proj.lora_A.weight [4, 5] where the model has [4, 32]"),
    "rank": (lambda f: edit_config(f, r=8), "lora_A.weight [4, 32] where the model has [8, 32]"),
    "targets": (lambda f: edit_config(f, target_modules=["q_proj"]), "holds model.layers.0.self_attn.v_proj.lora_A"),
    "more-targets": (lambda f: edit_config(f, target_modules=["q_proj", "v_proj", "k_proj"]), "lacks model.layers.0"),
    "no-targets": (lambda f: edit_config(f, target_modules=None), "does not say its target_modules"),
    "other-model": (lambda f: edit_config(f, target_modules=["query"]), "selects no layer"),
    "dora": (lambda f: edit_config(f, use_dora=True), "lacks model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
    "whole": (lambda f: edit_config(f, modules_to_save=["lm_head"]), "lacks lm_head.weight"),
    "rows": (lambda f: edit_config(f, trainable_token_indices=[3]), "token_adapter.trainable_tokens_delta"),
    "nan": (lambda f: edit_weights(f, _nan), "lora_A.weight' in"),
    "inf": (lambda f: edit_weights(f, _inf), "holds values that are not finite; the adapter is broken"),
    "names": (lambda f: edit_weights(f, _rename), "which is not a PEFT name (they start with 'base_model.model.')"),
    "torn": (_torn, "is torn or not a safetensors file"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "is torn or not a safetensors file"),
    "pickle": (_pickle_only, "holds a pickle file (adapter_model.bin), which could run code"),
    "no-weights": (lambda f: (f / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "no-config": (lambda f: (f / CONFIG).unlink(), "is not an adapter: it has no adapter_config.json"),
    "no-folder": (lambda f: shutil.rmtree(f), "is not an adapter: it is not a folder"),
    "not-json": (lambda f: (f / CONFIG).write_text("{r: 4"), "can't be read"),
    "a-list": (lambda f: (f / CONFIG).write_text("[]"), "must hold a JSON object, not list"),
    "method": (lambda f: edit_config(f, peft_type="IA3"), "is a 'IA3' adapter; only LORA folders can be read"),
    "type": (lambda f: edit_config(f, r="four"), "adapter_config.json.r must be"),
    "zero": (lambda f: edit_config(f, r=0), "r must be a positive whole number, not 0"),
    "bias-name": (lambda f: edit_config(f, bias="most"), "unknown bias 'most'"),
    "lora-bias": (lambda f: edit_config(f, lora_bias=True), "uses lora_bias=True, which is not supported"),
    "qalora": (lambda f: edit_config(f, use_qalora=True), "uses use_qalora=True"),
    "parameters": (lambda f: edit_config(f, target_parameters=["x"]), "uses target_parameters=['x']"),
    "replication": (lambda f: edit_config(f, layer_replication=[[0, 2]]), "uses layer_replication="),
    "alora": (lambda f: edit_config(f, alora_invocation_tokens=[1]), "uses alora_invocation_tokens=[1]"),
    "tying": (lambda f: edit_config(f, ensure_weight_tying=True), "uses ensure_weight_tying=True"),
    "newer": (lambda f: edit_config(f, use_miracle={"k": 1}), "uses use_miracle={'k': 1}, which is not supported"),
    "loftq": (lambda f: edit_config(f, init_lora_weights="loftq"), "which changes the base in a way that the folder"),
    "corda": (lambda f: edit_config(f, init_lora_weights="corda"), "path_initial_model_for_weight_conversion"),
    "random-pissa": (lambda f: edit_config(f, init_lora_weights="pissa_niter_4"), "changes the base in a way"),
    "expression": (lambda f: edit_config(f, target_modules="(q"), "is not a regular expression"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("state", ["plain", "attached-alike", "attached-otherwise"])
def test_a_broken_folder_leaves_the_model_as_it_was(case, state, tmp_path):
    change, message = BROKEN[case]
    folder = saved(tmp_path / "broken")
    change(folder)
    model = tiny.llama().train()
    if state == "attached-alike":
        attach(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    if state == "attached-otherwise":
        attach(
            model, LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["lm_head"], trainable_token_indices=[3])
        )
    randomise(model) if is_attached(model) else None
    before, expected = snapshot(model), logits(model, input_ids=IDS)
    with pytest.raises(RequestError) as caught:
        load_adapter(model, folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, input_ids=IDS), expected)
    if is_attached(model):
        save_adapter(model, tmp_path / "still")
        detach(model)
    assert torch.equal(logits(model, input_ids=IDS), logits(tiny.llama(), input_ids=IDS))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "query", "Wqkv"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["query"]},
        {"target_modules": ["q_proj"], "rank_pattern": {"query": 2}},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "score"]},
    ],
)
def test_what_matches_nothing_in_peft_s_configuration_is_let_stand(options, tmp_path):
    """Lists that serve several kinds of models are common; here the weights say what there must be."""
    theirs = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=4, **options)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    mine = load_adapter(tiny.llama(), tmp_path)
    assert relative(logits(mine, input_ids=IDS), logits(theirs, input_ids=IDS)) < 1e-6


def test_a_head_with_all_biases_of_peft_is_read(tmp_path):
    """PEFT writes such a head's bias three times, under names of its own modules."""
    options = {"r": 4, "target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}
    theirs = peft.get_peft_model(tiny.bert_classifier(), peft.LoraConfig(**options)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = load_adapter(tiny.bert_classifier(), tmp_path / "theirs")
    assert relative(logits(mine, input_ids=IDS), logits(theirs, input_ids=IDS)) < 1e-6
    save_adapter(mine, tmp_path / "mine")
    again = peft.PeftModel.from_pretrained(tiny.bert_classifier(), tmp_path / "mine").eval()
    assert relative(logits(again, input_ids=IDS), logits(theirs, input_ids=IDS)) < 1e-6
