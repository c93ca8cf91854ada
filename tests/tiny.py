"""Tiny random models of each family, and a byte-level tokenizer with a ChatML template: no network, milliseconds."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
VOCABULARY = 256 + len(SPECIAL)


def tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Every byte is a token; 260 tokens in all. Ends turns with <|im_end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token=None, pad_token="<|pad|>", unk_token=None
    )
    fast.chat_template = chat_template
    return fast


def _seeded(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = build().eval()
    torch.random.set_rng_state(state)
    return model


_DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=259,
    eos_token_id=258,
    bos_token_id=256,
)


def llama(tied: bool = False, **more: object) -> PreTrainedModel:
    config = transformers.LlamaConfig(**{**_DECODER, "tie_word_embeddings": tied, **more})
    return _seeded(lambda: transformers.LlamaForCausalLM(config))


def qwen(tied: bool = False) -> PreTrainedModel:
    config = transformers.Qwen2Config(**_DECODER, tie_word_embeddings=tied)
    return _seeded(lambda: transformers.Qwen2ForCausalLM(config))


def mistral(window: int = 8) -> PreTrainedModel:
    config = transformers.MistralConfig(**_DECODER, sliding_window=window, tie_word_embeddings=False)
    return _seeded(lambda: transformers.MistralForCausalLM(config))


def gemma3(window: int = 8) -> PreTrainedModel:
    config = transformers.Gemma3TextConfig(
        **_DECODER, head_dim=8, sliding_window=window, layer_types=["sliding_attention", "full_attention"]
    )
    return _seeded(lambda: transformers.Gemma3ForCausalLM(config))


def gemma2() -> PreTrainedModel:
    config = transformers.Gemma2Config(**_DECODER, head_dim=8, sliding_window=8, final_logit_softcapping=5.0)
    return _seeded(lambda: transformers.Gemma2ForCausalLM(config))


def cohere() -> PreTrainedModel:
    config = transformers.CohereConfig(**_DECODER, logit_scale=0.25)
    return _seeded(lambda: transformers.CohereForCausalLM(config))


def gpt2() -> PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        pad_token_id=259,
        eos_token_id=258,
        bos_token_id=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return _seeded(lambda: transformers.GPT2LMHeadModel(config))


def gptj() -> PreTrainedModel:
    config = transformers.GPTJConfig(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        rotary_dim=4,
        pad_token_id=259,
        eos_token_id=258,
        bos_token_id=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
    )
    return _seeded(lambda: transformers.GPTJForCausalLM(config))


def mamba() -> PreTrainedModel:
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, tie_word_embeddings=False
    )
    return _seeded(lambda: transformers.MambaForCausalLM(config))


def mixtral() -> PreTrainedModel:
    config = transformers.MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2)
    return _seeded(lambda: transformers.MixtralForCausalLM(config))


_BERT = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=512,
    pad_token_id=259,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def bert() -> PreTrainedModel:
    return _seeded(lambda: transformers.BertModel(transformers.BertConfig(**_BERT)))


def bert_classifier(num_labels: int = 3) -> PreTrainedModel:
    config = transformers.BertConfig(**_BERT, num_labels=num_labels)
    return _seeded(lambda: transformers.BertForSequenceClassification(config))


_T5 = dict(
    vocab_size=VOCABULARY,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    dropout_rate=0.0,
    pad_token_id=259,
    eos_token_id=258,
    decoder_start_token_id=259,
)


def t5(**more: object) -> PreTrainedModel:
    """Tied, so with a scale before its head."""
    return _seeded(lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**{**_T5, **more})))


def mt5() -> PreTrainedModel:
    """Untied, gated."""
    config = transformers.MT5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return _seeded(lambda: transformers.MT5ForConditionalGeneration(config))


def bart() -> PreTrainedModel:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        dropout=0.0,
        pad_token_id=259,
        bos_token_id=256,
        eos_token_id=258,
        decoder_start_token_id=258,
        forced_eos_token_id=None,
        init_std=0.2,
    )
    return _seeded(lambda: transformers.BartForConditionalGeneration(config))


def resnet() -> PreTrainedModel:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return _seeded(lambda: transformers.ResNetForImageClassification(config))


CAUSAL_LMS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tied=True),
    "qwen": qwen,
    "mistral": mistral,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "cohere": cohere,
    "gpt2": gpt2,
    "gptj": gptj,
    "mixtral": mixtral,
}


SEQ2SEQ_LMS: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": t5,
    "mt5": mt5,
    "bart": bart,
}


def token_ids(rows: int = 2, length: int = 11, seed: int = 0) -> torch.Tensor:
    """Random byte tokens, [rows, length]."""
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, word pieces (each letter, a few words, `##s` and `##letter`), [CLS] and [SEP] around."""
    letters = [chr(ord("a") + i) for i in range(26)] + list("0123456789.,!?'-")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    pieces += ["ada", "smile", "good", "bad", "film", "the"]
    tokenizer = Tokenizer(
        models.WordPiece(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")  # type: ignore[arg-type]
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def encoder(dropout: float = 0.0, **more: object) -> PreTrainedModel:
    """A BERT for `word_tokenizer`."""
    changes = dict(
        vocab_size=len(word_tokenizer()), pad_token_id=0, max_position_embeddings=64, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, initializer_range=0.2, **more,
    )  # fmt: skip
    return _seeded(lambda: transformers.BertModel(transformers.BertConfig(**{**_BERT, **changes})))
