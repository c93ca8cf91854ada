"""Packed rows equal each row alone under stock attention: logits, losses and gradients, on every family."""

import copy

import pytest
import torch
import transformers

from rankwise.errors import RequestError
from rankwise.models import attention
from rankwise.models.attention import SEGMENTED, forward_inputs, packed_inputs, packing_mode, restore_attention
from rankwise.models.loss import token_losses
from tests import tiny
from tests.models.batches import packed, padded, rows_of

LENGTHS = (19, 5, 1, 12)  # tests.tiny's windows are 8
REFUSED = r"data\.packing=false"
FAMILIES = sorted(tiny.CAUSAL_LMS)


@pytest.fixture(params=["segments", "mask"])
def mode(request, monkeypatch) -> str:
    """Both ways to pack: `mask` by making the other one unavailable."""
    if request.param == "mask":
        monkeypatch.setattr(attention, "switch_to_segments", lambda model: False)
    return request.param


def losses_alone(model, rows) -> list[torch.Tensor]:
    """The reference: one row at a time, stock attention, the model's own logits."""
    found = []
    for ids, labels in rows:
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none", ignore_index=-100)
        found.append(losses[labels[1:] != -100])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_equal_rows_alone(family, mode):
    model, stock = tiny.CAUSAL_LMS[family](), tiny.CAUSAL_LMS[family]()
    rows = rows_of(LENGTHS)
    batch = packed(rows)
    assert packing_mode(model) == mode
    with torch.no_grad():
        logits = model(**packed_inputs(batch, packing_mode(model), model)).logits[0].split(LENGTHS)
        for found, (ids, _) in zip(logits, rows, strict=True):
            torch.testing.assert_close(found, stock(input_ids=ids[None]).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_losses_and_gradients_equal_rows_alone(family, mode, checkpointing):
    model, stock = tiny.CAUSAL_LMS[family](), tiny.CAUSAL_LMS[family]()
    rows = rows_of(LENGTHS)
    if checkpointing:
        model.train().activation_checkpointing_enable()
        packing_mode(model)
        calls = count_attention_calls(model)
    losses = token_losses(model, packed(rows))
    wanted = torch.cat(losses_alone(stock, rows))
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(0.5, 1.5, len(losses))
    (losses * weights).sum().backward()
    (wanted * weights).sum().backward()
    if checkpointing:
        assert calls[0] == 3, "the check, the forward and the recomputation"
    for (name, parameter), reference in zip(model.named_parameters(), stock.parameters(), strict=True):
        if reference.grad is None:
            assert parameter.grad is None, name
            continue
        scale = reference.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-4, atol=1e-5 * max(scale, 1e-3), msg=name)


def count_attention_calls(model) -> list[int]:
    calls = [0]
    first = next(module for module in model.modules() if type(module).__name__.endswith("Attention"))

    def count(module, arguments, output):
        calls[0] += 1

    first.register_forward_hook(count)
    return calls


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "gptj"])
def test_padded_batches_behave_as_before(family):
    model, stock = tiny.CAUSAL_LMS[family](), tiny.CAUSAL_LMS[family]()
    assert packing_mode(model) == "segments"
    batch = padded(rows_of((19, 11, 14)))
    inputs = forward_inputs(batch, model)
    assert "segment_lengths" not in inputs
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_of_left_padded_rows_is_unchanged(family):
    model, stock = tiny.CAUSAL_LMS[family](), tiny.CAUSAL_LMS[family]()
    packing_mode(model)
    ids = tiny.token_ids(3, 14)
    mask = torch.ones_like(ids)
    mask[0, :9], mask[1, :3] = 0, 0

    def generate(one: transformers.PreTrainedModel) -> torch.Tensor:
        return one.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=259
        )

    assert torch.equal(generate(model), generate(stock))
    token_losses(model, packed(rows_of(LENGTHS)))  # and packing goes on working afterwards


@pytest.mark.parametrize("build", [tiny.bert, tiny.bert_classifier], ids=["bert", "classifier"])
def test_encoders_pack_with_bidirectional_attention(build):
    model, stock = build().base_model, build().base_model
    rows = rows_of((9, 4, 17))
    assert packing_mode(model) == "segments"
    with torch.no_grad():
        hidden = model(**packed_inputs(packed(rows), "segments", model)).last_hidden_state[0].split((9, 4, 17))
        for found, (ids, _) in zip(hidden, rows, strict=True):
            torch.testing.assert_close(found, stock(input_ids=ids[None]).last_hidden_state[0], rtol=1e-5, atol=1e-5)
        batch = padded(rows)
        inputs = forward_inputs(batch, model)
        assert torch.equal(model(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_the_model_keeps_its_own_choice(name, tmp_path):
    model = tiny.mistral()
    model.set_attn_implementation(name)
    packing_mode(model)
    assert model.config._attn_implementation == SEGMENTED[name]
    model.save_pretrained(tmp_path)
    assert "rankwise" not in "".join(file.read_text() for file in tmp_path.glob("*.json"))
    restore_attention(model)
    assert model.config._attn_implementation == name


def test_a_copy_of_a_prepared_model_packs_too():
    model = tiny.llama()
    packing_mode(model)
    twin = copy.deepcopy(model)
    rows = rows_of(LENGTHS)
    assert torch.equal(token_losses(twin, packed(rows)), token_losses(model, packed(rows)))
    restore_attention(twin)
    assert twin.config._attn_implementation == "sdpa"


def test_an_implementation_that_was_changed_afterwards_is_noticed():
    model = tiny.llama()
    rows = rows_of(LENGTHS)
    wanted = token_losses(model, packed(rows))
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(token_losses(model, packed(rows)), wanted)


def test_the_probe_leaves_training_modes_alone():
    model = tiny.llama().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    packing_mode(model)
    assert [module.training for module in model.modules()] == before


def test_windows_up_to_the_segment_need_no_mask(monkeypatch):
    """A window that a segment does not exceed is plain causal attention; otherwise it is cut from the mask."""
    masks = []
    stock = attention.sdpa_attention_forward

    def spy(module, query, key, value, mask, **options):
        masks.append((query.shape[2], mask is not None))
        return stock(module, query, key, value, mask, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    model = tiny.mistral(window=12)
    batch = packed(rows_of(LENGTHS))
    mode = packing_mode(model)
    masks.clear()
    model(**packed_inputs(batch, mode, model))
    assert set(masks) == {(19, True), (5, False), (1, False), (12, False)}


def test_an_encoder_decoder_model_is_refused_and_keeps_its_own_attention():
    model = tiny.t5()
    with pytest.raises(RequestError, match=REFUSED):
        packing_mode(model)
    assert model.config._attn_implementation == tiny.t5().config._attn_implementation


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_padded_rows_equal_rows_alone_under_stock_attention(family):
    """Without a registered mask function padded rows would get no mask at all, in silence."""
    model, stock = tiny.CAUSAL_LMS[family](), tiny.CAUSAL_LMS[family]()
    assert packing_mode(model) == "segments"
    rows = rows_of((19, 5, 12))  # the windows are 8
    with torch.no_grad():
        logits = model(**forward_inputs(padded(rows), model)).logits
        for found, (ids, _) in zip(logits, rows, strict=True):
            torch.testing.assert_close(found[: len(ids)], stock(input_ids=ids[None]).logits[0], rtol=1e-5, atol=1e-5)


def test_padded_rows_of_an_encoder_equal_rows_alone():
    model, stock = tiny.bert(), tiny.bert()
    assert packing_mode(model) == "segments"
    rows = rows_of((9, 4, 17))
    with torch.no_grad():
        hidden = model(**forward_inputs(padded(rows), model)).last_hidden_state
        for found, (ids, _) in zip(hidden, rows, strict=True):
            wanted = stock(input_ids=ids[None]).last_hidden_state[0]
            torch.testing.assert_close(found[: len(ids)], wanted, rtol=1e-5, atol=1e-5)


def test_a_model_that_carries_state_across_samples_is_refused():
    config = transformers.MambaConfig(vocab_size=260, hidden_size=16, state_size=4, num_hidden_layers=2)
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config).eval()
    with pytest.raises(RequestError, match=r"MambaForCausalLM cannot keep packed samples apart.*data\.packing=false"):
        packing_mode(model)


def test_numbers_that_are_not_finite_are_not_blamed_on_packing():
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(RequestError, match=r"LlamaForCausalLM gives inf or nan .*float32 is too narrow"):
        packing_mode(model)


def test_chunked_attention_is_packed_by_its_own_mask():
    """Its chunks count from the start of a row, so their blocks of a packed mask are wrong, however short the probe."""
    config = transformers.Llama4TextConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, attention_chunk_size=16,
        max_position_embeddings=512, pad_token_id=259, eos_token_id=258, bos_token_id=256,
        layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(config).eval()
    assert packing_mode(model) == "mask"
    rows = rows_of((19, 40, 7))
    with torch.no_grad():
        wanted = torch.cat(losses_alone(model, rows))
        torch.testing.assert_close(token_losses(model, packed(rows)), wanted, rtol=1e-5, atol=1e-5)


def test_a_model_without_position_ids_is_refused_in_one_line():
    config = transformers.BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4)
    torch.manual_seed(0)
    with pytest.raises(RequestError, match=REFUSED) as caught:
        packing_mode(transformers.BloomForCausalLM(config).eval())
    assert "\n" not in str(caught.value)


def test_the_probe_can_fail(monkeypatch):
    """If our attention forgot the segments, the probe would notice, and the model would have its own attention back."""
    monkeypatch.setattr(
        attention,
        "_per_segment",
        lambda stock, module, qkv, mask, lengths, options: stock(module, *qkv, mask, **options),
    )
    model = tiny.bert()
    with pytest.raises(RequestError, match=REFUSED):
        packing_mode(model)
    assert model.config._attn_implementation == "sdpa"
    assert packing_mode(tiny.llama()) == "mask"


def test_forwards_with_a_cache_refuse_segments():
    model = tiny.llama()
    batch = packed(rows_of((6, 4)))
    inputs = packed_inputs(batch, packing_mode(model), model)
    cache = model(input_ids=batch.input_ids, use_cache=True).past_key_values
    with pytest.raises(NotImplementedError, match="without a cache"):
        model(**{**inputs, "attention_mask": None, "use_cache": True}, past_key_values=cache)
