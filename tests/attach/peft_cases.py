"""The cases of the differential tests: (name, kind of case, model, PEFT's LoraConfig arguments)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tests import tiny

QKV = ["q_proj", "k_proj", "v_proj"]
TOKENS = sorted({int(token) for token in tiny.token_ids()[0, :4]})  # tokens that the inputs hold


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    model: Callable[[], PreTrainedModel]
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], dict[str, torch.Tensor]] = lambda: {"input_ids": tiny.token_ids()}
    mergeable: bool = True


def _t5_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": tiny.token_ids(), "decoder_input_ids": tiny.token_ids(seed=1)}


def _pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def _case(name: str, kind: str, model: Callable[[], PreTrainedModel], **options: Any) -> Case:
    inputs = {"t5": _t5_inputs, "resnet": _pixels}.get(model.__name__, Case.inputs)
    return Case(name, kind, model, options, inputs)


def llama_tied() -> PreTrainedModel:
    return tiny.llama(tied=True)


CASES = [
    # each family
    _case("llama-all-linear", "family", tiny.llama, target_modules="all-linear"),
    _case("llama-tied-all-linear", "family", llama_tied, target_modules="all-linear"),
    _case("qwen-all-linear", "family", tiny.qwen, target_modules="all-linear"),
    _case("mistral-all-linear", "family", tiny.mistral, target_modules="all-linear"),
    _case("gemma3-all-linear", "family", tiny.gemma3, target_modules="all-linear"),
    _case("gpt2-all-linear", "family", tiny.gpt2, target_modules="all-linear"),
    _case("gpt2-names", "family", tiny.gpt2, target_modules=["attn.c_attn", "mlp.c_fc", "mlp.c_proj"]),
    _case("gptj-names", "family", tiny.gptj, target_modules=["q_proj", "mlp.fc_in", "mlp.fc_out"]),
    _case("gptj-all-linear", "family", tiny.gptj, target_modules="all-linear"),
    _case("mixtral-attention", "family", tiny.mixtral, target_modules=[*QKV, "o_proj"]),
    _case("bert-all-linear", "family", tiny.bert, target_modules="all-linear"),
    _case("t5-all-linear", "family", tiny.t5, target_modules="all-linear", task_type="SEQ_2_SEQ_LM"),
    _case("t5-q-v", "family", tiny.t5, target_modules=["q", "v"]),
    _case("resnet-convolutions", "layer", tiny.resnet, target_modules=r".*\.convolution", r=4),
    _case("resnet-convolution-rslora", "layer", tiny.resnet, target_modules=["convolution"], use_rslora=True, r=3),
    # layers
    _case("llama-embedding", "layer", tiny.llama, target_modules=["embed_tokens", "q_proj"]),
    _case("gemma3-scaled-embedding", "layer", tiny.gemma3, target_modules=["embed_tokens", "q_proj"]),
    _case("llama-head", "layer", tiny.llama, target_modules=["lm_head", "q_proj"]),
    _case("gpt2-embedding", "layer", tiny.gpt2, target_modules=["wte", "c_attn"]),
    _case("bert-embedding-full-name", "layer", tiny.bert, target_modules=["embeddings.word_embeddings", "query"]),
    # targets
    _case("suffix", "target", tiny.llama, target_modules=QKV),
    _case("full-name", "target", tiny.llama, target_modules=["model.layers.1.mlp.down_proj"]),
    _case("regex", "target", tiny.llama, target_modules=r".*\.(q|v)_proj"),
    _case("regex-layer", "target", tiny.llama, target_modules=r"model\.layers\.[0]\..*(gate|up)_proj"),
    _case("exclude-list", "target", tiny.llama, target_modules="all-linear", exclude_modules=["down_proj"]),
    _case("exclude-regex", "target", tiny.llama, target_modules=QKV, exclude_modules=r".*layers\.0\.self_attn\.k_proj"),
    _case("layers-to-transform", "target", tiny.llama, target_modules=QKV, layers_to_transform=[1]),
    _case("layer-number", "target", tiny.gpt2, target_modules=["c_attn"], layers_to_transform=0, layers_pattern="h"),
    _case("layers-pattern", "target", tiny.bert, target_modules=["query"], layers_to_transform=[0],
          layers_pattern=["layer"]),
    # ranks and alphas
    _case("rank-pattern", "pattern", tiny.llama, target_modules=QKV, rank_pattern={"q_proj": 3, "k_proj": 5}),
    _case("rank-pattern-precedence", "pattern", tiny.llama, target_modules=QKV,
          rank_pattern={r"model\.layers\.0\.self_attn\.q_proj": 2, "q_proj": 6}),
    _case("alpha-pattern", "pattern", tiny.llama, target_modules=QKV, alpha_pattern={r".*\.v_proj": 3, "k_proj": 48}),
    _case("both-patterns", "pattern", tiny.gpt2, target_modules=["c_attn", "c_fc"], rank_pattern={"c_fc": 2},
          alpha_pattern={"c_fc": 5, "attn.c_attn": 7}),
    _case("rank-pattern-rslora", "pattern", tiny.llama, target_modules=QKV, use_rslora=True,
          rank_pattern={"v_proj": 9}),
    # scale
    _case("rslora", "scale", tiny.llama, target_modules="all-linear", use_rslora=True, r=9, lora_alpha=4),
    _case("rank-one", "scale", tiny.llama, target_modules="all-linear", r=1, lora_alpha=1),
    _case("rank-over-width", "scale", tiny.llama, target_modules=["k_proj"], r=40, lora_alpha=80),
    # bias
    _case("bias-all-qwen", "bias", tiny.qwen, target_modules=["q_proj", "o_proj"], bias="all"),
    _case("bias-lora-only-qwen", "bias", tiny.qwen, target_modules=["q_proj", "o_proj"], bias="lora_only"),
    _case("bias-all-gpt2", "bias", tiny.gpt2, target_modules=["c_attn"], bias="all"),
    _case("bias-lora-only-gpt2", "bias", tiny.gpt2, target_modules=["c_attn", "c_fc"], bias="lora_only"),
    _case("bias-all-bert", "bias", tiny.bert, target_modules=["query"], bias="all"),
    _case("bias-all-resnet", "bias", tiny.resnet, target_modules=["convolution"], r=2, bias="all"),
    _case("bias-all-gptj", "bias", tiny.gptj, target_modules=["fc_in"], bias="all"),
    # DoRA
    _case("dora-llama", "dora", tiny.llama, target_modules="all-linear", use_dora=True),
    _case("dora-gpt2", "dora", tiny.gpt2, target_modules="all-linear", use_dora=True),
    _case("dora-qwen-bias", "dora", tiny.qwen, target_modules=QKV, use_dora=True),
    _case("dora-embedding", "dora", tiny.llama, target_modules=["embed_tokens", "q_proj"], use_dora=True),
    _case("dora-rslora", "dora", tiny.llama, target_modules=QKV, use_dora=True, use_rslora=True),
    _case("dora-bert", "dora", tiny.bert, target_modules=["query", "dense"], use_dora=True),
    # starts (the file only tells the name: the factors are drawn anew in each test)
    _case("gaussian", "start", tiny.llama, target_modules=QKV, init_lora_weights="gaussian"),
    _case("random-b", "start", tiny.llama, target_modules=QKV, init_lora_weights=False),
    _case("orthogonal", "start", tiny.llama, target_modules=QKV, init_lora_weights="orthogonal"),
    # whole modules
    _case("head-and-embedding-whole", "modules_to_save", tiny.llama, target_modules=QKV,
          modules_to_save=["embed_tokens", "lm_head"]),
    _case("head-whole-tied", "modules_to_save", llama_tied, target_modules=QKV, modules_to_save=["lm_head"]),
    _case("norm-whole", "modules_to_save", tiny.llama, target_modules="all-linear",
          modules_to_save=["input_layernorm"]),
    _case("batch-norm-whole", "modules_to_save", tiny.resnet, target_modules=["convolution"], r=2,
          modules_to_save=["normalization"]),
    _case("classifier", "modules_to_save", tiny.bert_classifier, target_modules=["query"], task_type="SEQ_CLS"),
    _case("classifier-all-linear", "modules_to_save", tiny.bert_classifier, target_modules="all-linear",
          task_type="SEQ_CLS"),
    _case("classifier-bias", "modules_to_save", tiny.bert_classifier, target_modules=["query"], task_type="SEQ_CLS",
          bias="lora_only"),
    # token rows
    _case("token-rows", "tokens", tiny.llama, target_modules=QKV, trainable_token_indices=[3, 7, 250]),
    _case("token-rows-unsorted", "tokens", tiny.llama, target_modules=QKV, trainable_token_indices=[250, 3]),
    _case("token-rows-tied", "tokens", llama_tied, target_modules=QKV, trainable_token_indices=[3, 7]),
    _case("token-rows-named", "tokens", tiny.gpt2, target_modules=["c_attn"], trainable_token_indices={"wte": [1, 2]}),
    _case("token-rows-gemma3", "tokens", tiny.gemma3, target_modules=QKV, trainable_token_indices=[5]),
    _case("token-rows-bert", "tokens", tiny.bert, target_modules=["query"], trainable_token_indices=TOKENS),
    _case("token-rows-t5", "tokens", tiny.t5, target_modules=["q"], trainable_token_indices=TOKENS),
    _case("token-rows-t5-encoder", "tokens", tiny.t5, target_modules=["q"],
          trainable_token_indices={"encoder.embed_tokens": TOKENS}),
    _case("token-rows-and-whole-head", "tokens", tiny.llama, target_modules=QKV, trainable_token_indices=TOKENS,
          modules_to_save=["lm_head"]),
]  # fmt: skip


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Makes every trainable number matter: adds noise that depends on the parameter's shape only."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
