"""Tiny models of the families that GGUF holds, and tokenizers that cut text in each of the ways that it can name."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import adapter_parameters, attach
from rankwise.export.gguf_tokenizer import HARD_TEXTS, PRE_TOKENIZERS
from tests.tiny import CHATML

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    *HARD_TEXTS,
    "the cat sat on the mat, and the dog ran after the cat",
    "in 1999 and 2024 there were 100 of them",
]
ROWS = 512


def _split(name: str) -> pre_tokenizers.PreTokenizer:
    [line] = [part for part in PRE_TOKENIZERS[name] if part.startswith("split ")]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(line.removeprefix("split ")), "isolated"), bytes_])


CUTTERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: _split("llama-bpe"),
    "qwen2": lambda: _split("qwen2"),
    "tekken": lambda: _split("tekken"),
}


def bpe_tokenizer(kind: str = "smollm", chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """BPE over bytes with merges learned from a few lines, three control tokens, one added word and a bos or none."""
    begins = kind in ("llama-bpe", "tekken")
    tokenizer = Tokenizer(models.BPE(ignore_merges="whole words first" in PRE_TOKENIZERS[kind]))
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = CUTTERS[kind]()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("rankwise", normalized=False)])
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = chat_template
    return fast


def piece_tokenizer(prepends: bool = False) -> PreTrainedTokenizerFast:
    """BPE in SentencePiece's way: ▁ for spaces, bytes for letters that are not known, <s> before a text.

    With `prepends` a ▁ is put before every text, as Llama 2's own file does; else where none is there.
    """
    special = ["<unk>", "<s>", "</s>"]
    letters = sorted(
        {letter for text in CORPUS for letter in text if letter.isascii() and letter.isprintable()} | {"▁"}
    )
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = spaces
    trainer = trainers.BpeTrainer(
        vocab_size=200, initial_alphabet=letters, limit_alphabet=len(letters), show_progress=False, max_token_length=8
    )
    learned.train_from_iterator(CORPUS, trainer)
    merges = [tuple(merge) for merge in json.loads(learned.to_str())["model"]["merges"]]
    pieces = sorted(learned.get_vocab(), key=lambda piece: learned.token_to_id(piece))
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if prepends:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = spaces
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


SIZES = dict(
    vocab_size=ROWS, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, pad_token_id=0, bos_token_id=0,
    eos_token_id=2,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def _built(model_class: type, config: transformers.PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():  # biases and norms that are not what they start as
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def llama(**more: object) -> PreTrainedModel:
    config = transformers.LlamaConfig(**{**SIZES, "tie_word_embeddings": True, **more})
    return _built(transformers.LlamaForCausalLM, config)


def mistral(window: int | None = 64) -> PreTrainedModel:
    config = transformers.MistralConfig(**SIZES, sliding_window=window, tie_word_embeddings=False)
    return _built(transformers.MistralForCausalLM, config)


def qwen2() -> PreTrainedModel:
    return _built(transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**SIZES, tie_word_embeddings=True))


def qwen3() -> PreTrainedModel:
    config = transformers.Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False)
    return _built(transformers.Qwen3ForCausalLM, config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama-tied": llama,
    "llama-untied": lambda: llama(tie_word_embeddings=False),
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama-head-dim": lambda: llama(head_dim=32),
    "llama3-rope": lambda: llama(rope_parameters=LLAMA3),
    "linear-rope": lambda: llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
}


def attached(model: PreTrainedModel, **fields: object) -> PreTrainedModel:
    """With an adapter that changes something."""
    attach(model, LoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", **fields}))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model
