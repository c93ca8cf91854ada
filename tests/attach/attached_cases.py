"""Attached models of every kind: what the tests of attaching, merging and saving run over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import attach
from tests import tiny
from tests.attach.peft_cases import randomise

IDS = tiny.token_ids()
Build = Callable[[], PreTrainedModel]


def tied() -> PreTrainedModel:
    return tiny.llama(tied=True)


def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


EVERYTHING = {
    "lora": (tiny.llama, {}),
    "dora": (tiny.llama, {"use_dora": True}),
    "pissa": (tiny.llama, {"init_lora_weights": "pissa"}),
    "embedding": (tiny.gemma3, {"target_modules": ["embed_tokens", "q_proj"]}),
    "bias-all": (tiny.gpt2, {"target_modules": ["c_attn"], "bias": "all"}),
    "bias-lora-only": (tiny.qwen, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "modules-to-save": (tiny.llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "modules-to-save-tied": (tied, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "head-and-all-biases": (tiny.bert_classifier, {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}),
    "buffers": (tiny.resnet, {"target_modules": ["convolution"], "modules_to_save": ["normalization"]}),
    "token-rows": (tiny.llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 60]}),
    "token-rows-tied": (tied, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 60]}),
    "token-rows-t5": (tiny.t5, {"target_modules": ["q"], "trainable_token_indices": [3, 60]}),
    "rows-and-head": (tiny.llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3],
                                   "modules_to_save": ["lm_head"]}),
}  # fmt: skip


def inputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    if model.config.model_type == "resnet":
        return {"pixel_values": pixels()}
    ids = IDS.clone()
    ids[:, 0], ids[:, 1] = 3, 60  # the trained tokens
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def attached(what: str) -> PreTrainedModel:
    build, options = EVERYTHING[what]
    model = attach(build(), LoraConfig(**{"r": 4, **options}))
    randomise(model)
    return model


class Shared(nn.Module):
    """One layer in three places of the tree, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(6, 6)
        self.first = layer
        self.rest = nn.ModuleList([layer, nn.Sequential(layer)])
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.rest[1](self.rest[0](self.first(x))))
        return self.one(x) + self.two(x)
