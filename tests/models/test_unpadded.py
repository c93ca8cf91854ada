"""Padded rows without their padding: logits and gradients are those of stock attention on padded rows."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AttentionInterface,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import adapter_parameters, attach
from rankwise.models import blocked, unpadded
from rankwise.models.embedding import embed
from rankwise.models.heads import head_logits
from rankwise.models.label_batch import LabelBatch

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99}
SMALL |= {"num_labels": 3, "pad_token_id": 0, "initializer_range": 0.2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}

MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL, **NO_DROPOUT)),
    "bert-tags": lambda: BertForTokenClassification(BertConfig(**SMALL, **NO_DROPOUT)),
    "bert-eager": lambda: BertForSequenceClassification(
        BertConfig(**SMALL, **NO_DROPOUT, attn_implementation="eager")
    ),
    "roberta": lambda: RobertaForSequenceClassification(
        RobertaConfig(**{**SMALL, "pad_token_id": 1}, **NO_DROPOUT, max_position_embeddings=64)
    ),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(
            dim=32, n_layers=3, n_heads=4, hidden_dim=48, vocab_size=99, num_labels=3, dropout=0.0,
            attention_dropout=0.0, seq_classif_dropout=0.0, initializer_range=0.2,
        )
    ),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL, num_key_value_heads=2)),
    "gpt2": lambda: GPT2ForSequenceClassification(
        GPT2Config(
            n_embd=32, n_layer=3, n_head=4, vocab_size=99, num_labels=3, pad_token_id=0, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
        )
    ),
}  # fmt: skip

KEPT_PADDED = {
    "mistral": lambda: MistralForSequenceClassification(
        MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4)
    ),
    "modernbert": lambda: ModernBertForSequenceClassification(
        ModernBertConfig(**SMALL, local_attention=4, global_attn_every_n_layers=2)
    ),
    "deberta": lambda: DebertaV2ForSequenceClassification(
        DebertaV2Config(
            **SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, relative_attention=True,
            pos_att_type=["c2p", "p2c"],
        )
    ),
}  # fmt: skip
"""Windows, and attention of a kind of its own."""


def made(build):
    torch.manual_seed(0)
    model = build().double()
    return attach(model, LoraConfig(r=4, init_lora_weights=False))


def batch(lengths=(9, 3, 6, 5), is_tagged=False, pad_id=0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 99, (len(lengths), max(lengths)), generator=generator)
    mask = torch.stack([(torch.arange(max(lengths)) < length).long() for length in lengths])
    targets = torch.randint(0, 3, ids.shape if is_tagged else (len(lengths),), generator=generator)
    return LabelBatch(ids.masked_fill(mask == 0, pad_id), mask, targets, is_tagged=is_tagged)


def seen_by_blocks(model):
    """The shapes that linear layers in blocks are given."""
    shapes = []
    layers = [module for name, module in model.named_modules() if ".1." in name and hasattr(module, "base")]
    layers[0].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:-1])))
    return shapes


def watched(model):
    """The shapes that the second block of a plain BERT is given."""
    shapes = []
    model.bert.encoder.layer[1].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    return shapes


def stock(model, data):
    return model(input_ids=data.input_ids, attention_mask=data.attention_mask).logits


def gradients(model, logits, data):
    chosen = logits[data.attention_mask.bool()] if data.is_tagged else logits
    weights = torch.linspace(-1, 1, chosen.numel(), dtype=chosen.dtype).view_as(chosen)
    model.zero_grad()
    (chosen * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in adapter_parameters(model).items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients_are_those_of_padded_rows(name, checkpointing):
    model = made(MODELS[name])
    data = batch(is_tagged=name == "bert-tags", pad_id=model.config.pad_token_id)
    twin = copy.deepcopy(model)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    shapes = seen_by_blocks(model)
    found, wanted = head_logits(model, data), stock(twin, data)
    there = data.attention_mask.bool() if data.is_tagged else slice(None)
    torch.testing.assert_close(found[there], wanted[there], rtol=1e-9, atol=1e-9)
    own, others = gradients(model, found, data), gradients(twin, wanted, data)
    for key in others:
        torch.testing.assert_close(own[key], others[key], rtol=1e-7, atol=1e-9)
    assert shapes[-1] == (1, 23) and set(shapes) <= {(4, 9), (1, 23)}
    torch.testing.assert_close(stock(model, data)[there], wanted[there])  # outside of our call: padded, as ever
    assert shapes[-1] == (4, 9)


@pytest.mark.parametrize("name", KEPT_PADDED)
def test_models_with_another_attention_stay_padded(name):
    model = made(KEPT_PADDED[name]).eval()
    data, implementation = batch(), model.config._attn_implementation
    shapes = seen_by_blocks(model)
    wanted = stock(model, data)
    for _ in range(2):
        torch.testing.assert_close(head_logits(model, data), wanted)
        assert shapes[-1] == (4, 9)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("lengths", [(7, 7, 7), (7,), (7, 0, 0)])
def test_rows_without_padding_or_without_tokens_go_the_usual_way(lengths):
    model = made(MODELS["bert"]).eval()
    shapes = seen_by_blocks(model)
    head_logits(model, batch(lengths))
    assert shapes == [(len(lengths), 7)] and model.config._attn_implementation == "sdpa"


def test_another_batch_of_other_lengths_and_a_row_padded_on_the_left():
    model = made(MODELS["bert-tags"]).eval()
    head_logits(model, batch(is_tagged=True))
    data = batch((2, 12, 7), is_tagged=True)
    flipped = LabelBatch(data.input_ids.flip(1), data.attention_mask.flip(1), data.targets.flip(1), is_tagged=True)
    for one in (data, flipped):
        there = one.attention_mask.bool()
        torch.testing.assert_close(head_logits(model, one)[there], stock(model, one)[there], rtol=1e-9, atol=1e-9)


def test_a_head_that_reads_padding_keeps_it():
    """The first position of a row that is padded on the left is padding: what BERT's pooler makes of it is kept."""
    model = made(MODELS["bert"]).eval()
    data = batch((2, 12, 7))
    flipped = LabelBatch(data.input_ids.flip(1), data.attention_mask.flip(1), data.targets)
    shapes = seen_by_blocks(model)
    torch.testing.assert_close(head_logits(model, flipped), stock(model, flipped))
    assert shapes[-1] == (3, 12) and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_embeddings(pooling):
    model = made(MODELS["bert"]).bert.eval()
    data = batch()
    shapes = seen_by_blocks(model)
    found = embed(model, data.input_ids, data.attention_mask, pooling)
    assert shapes[-1] == (1, 23)
    alone = [embed(model, ids[None, :length], torch.ones(1, length, dtype=torch.int64), pooling)
             for ids, length in zip(data.input_ids, (9, 3, 6, 5), strict=True)]  # fmt: skip
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-9, atol=1e-9)


def test_attention_that_was_switched_back_is_proven_again():
    """Rows would see each other: stock attention takes no segments, and there is no mask."""
    model, data = made(MODELS["bert"]).eval(), batch()
    wanted = stock(model, data)
    for implementation in ("sdpa", "eager"):
        head_logits(model, data)
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(head_logits(model, data), wanted, rtol=1e-9, atol=1e-9)


def test_bf16_models_that_attend_by_blocks_and_copies_do_without_padding(monkeypatch):
    monkeypatch.setattr(blocked, "has_bf16_products", lambda: True)
    torch.manual_seed(0)
    model = attach(MODELS["bert"]().bfloat16(), LoraConfig(r=4, init_lora_weights=False)).eval()
    data = batch()
    wanted = stock(model, data)
    for one in (model, copy.deepcopy(model)):
        shapes = seen_by_blocks(one)
        # bf16 rounds to 0.11 of 2.8 here; rows that see their padding are off by 1.2
        torch.testing.assert_close(head_logits(one, data), wanted.float(), rtol=0.1, atol=0.1)
        assert shapes[-1] == (1, 23)


def test_blocks_whose_hooks_are_checkpointed_too_stay_padded(monkeypatch):
    """In transformers 5.0 hooks ran inside of the checkpoint, and were gone when it was computed again."""
    monkeypatch.setattr(unpadded, "HOOKS_STAY_OUTSIDE", False)
    model, data = made(MODELS["bert"]), batch()
    head_logits(model.eval(), data)
    shapes = seen_by_blocks(model)
    model.train().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    head_logits(model, data).sum().backward()
    assert shapes[-1] == (4, 9)
    head_logits(model.eval(), data)
    assert shapes[-1] == (1, 23)


class OfAllPositions(torch.nn.Module):
    """A pooler that takes the mean over padding too; or one that divides by what may be zero there."""

    def __init__(self, divides):
        super().__init__()
        self.divides = divides

    def forward(self, hidden):
        return (hidden / hidden.norm(dim=-1, keepdim=True) if self.divides else hidden).mean(1)


@pytest.mark.parametrize("divides", [False, True])
def test_a_pooling_that_reads_padding_keeps_it(divides):
    model, data = made(MODELS["bert"]).eval(), batch()
    model.bert.pooler = OfAllPositions(divides)
    shapes = seen_by_blocks(model)
    torch.testing.assert_close(head_logits(model, data), stock(model, data))
    assert shapes[-1] == (4, 9) and model.config._attn_implementation == "sdpa"


def test_a_head_of_zeros_proves_nothing_yet():
    torch.manual_seed(0)
    model, data = MODELS["bert"]().eval(), batch()
    weight, shapes = model.classifier.weight.detach().clone(), watched(model)
    torch.nn.init.zeros_(model.classifier.weight)
    head_logits(model, data)
    assert shapes[-1] == (4, 9)
    model.classifier.weight.data.copy_(weight)
    head_logits(model, data)
    assert shapes[-1] == (1, 23)


@pytest.mark.parametrize("error", [AssertionError, KeyboardInterrupt])
def test_a_block_that_takes_no_row_of_tokens_keeps_padded_ones(error):
    model, data = made(MODELS["bert"]).eval(), batch()
    wanted = stock(model, data)

    def refuses(module, args):
        if args[0].shape[0] == 1:
            raise error("no")

    model.bert.encoder.layer[1].register_forward_pre_hook(refuses)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            head_logits(model, data)
    else:
        torch.testing.assert_close(head_logits(model, data), wanted)
    assert model.config._attn_implementation == "sdpa"


def test_under_autocast_products_are_bf16_ones():
    torch.manual_seed(0)
    model, data = MODELS["bert"]().eval(), batch()
    shapes = watched(model)
    with torch.autocast("cpu", torch.bfloat16):
        head_logits(model, data)
    assert shapes[-1] == (1, 23)


def test_rows_that_hardly_see_each_other_prove_nothing():
    """An attention without segments, in bf16, whose rows are nearly what they are alone: the tolerance is no proof."""

    def deaf(*args, segment_lengths=None, **more):
        return sdpa_attention_forward(*args, **more)

    torch.manual_seed(0)
    config = BertConfig(**{**SMALL, "initializer_range": 0.02}, **NO_DROPOUT)
    model, data = BertForSequenceClassification(config).bfloat16().eval(), batch()
    shapes = watched(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "rankwise_segments", deaf)
        head_logits(model, data)
    assert shapes[-1] == (4, 9)


def test_dropout_falls_on_tokens_and_its_gradient_is_its_own():
    torch.manual_seed(0)
    model = attach(MODELS["bert"]().double(), LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False)).train()
    data = batch()
    head_logits(model, data)
    name, parameter = next(iter(adapter_parameters(model).items()))

    def loss():
        torch.manual_seed(3)
        return head_logits(model, data).square().sum()

    loss().backward()
    with torch.no_grad():
        parameter[0, 0] += 2**-13  # parameters are fp32
        up = loss()
        parameter[0, 0] -= 2**-12
        down = loss()
    assert parameter.grad[0, 0].item() == pytest.approx(((up - down) * 2**12).item(), rel=1e-3), name
