"""The chunked loss equals the model's own loss, with its gradients, and never holds all logits."""

import logging

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from rankwise.models import head_loss as head_loss_module
from rankwise.models import loss as loss_module
from rankwise.models.head_loss import CHUNK_ROWS, CROSS_ENTROPY, LogitMap, LossTerms, logit_losses
from rankwise.models.loss import example_losses, loss_path, token_losses
from tests import tiny
from tests.models.batches import packed, padded, rows_of
from tests.models.test_head_loss import Wrapped

LENGTHS = (19, 5, 1, 12)
BOTH = LossTerms(label_smoothing=0.1, z_loss=0.01)
LOGGER = "rankwise.models.loss"


class Shifted(transformers.LlamaForCausalLM):
    """Does to its logits what no scale or soft cap explains."""

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **options):
        output = super().forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **options)
        output.logits = output.logits + output.logits.roll(1, -1) * 0.5
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.config.vocab_size)
        return output


def shifted() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return Shifted(tiny.llama().config).eval()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(head_loss_module, "CHUNK_ROWS", 3)
    monkeypatch.setattr(head_loss_module, "BLOCK_ROWS", 2)


def own_loss(model, batch):
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss


@pytest.mark.parametrize("frozen_head", [True, False], ids=["frozen head", "trained head"])
def test_equals_the_models_own_loss_and_gradients(causal_lm, frozen_head, small_chunks):
    model = causal_lm
    model.get_output_embeddings().requires_grad_(not frozen_head)  # a tied embedding freezes with it
    batch = padded(rows_of(LENGTHS))
    losses = token_losses(model, batch)
    wanted = own_loss(model, batch)
    assert losses.dtype == torch.float32 and losses.shape == (batch.num_trained,)
    torch.testing.assert_close(losses.mean(), wanted, rtol=1e-6, atol=0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
    reference = torch.autograd.grad(wanted, parameters, allow_unused=True)
    for one, other in zip(found, reference, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", sorted(tiny.CAUSAL_LMS))
def test_every_family_takes_the_chunked_path_in_silence(family, dtype, caplog):
    model = tiny.CAUSAL_LMS[family]().to(dtype)
    batch = padded(rows_of(LENGTHS))
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        token_losses(model, batch)
    assert loss_path(model, batch) == "chunked" and caplog.records == []


@pytest.mark.parametrize(
    ("family", "logit_map"), [("gemma2", LogitMap(cap=5.0)), ("cohere", LogitMap(0.25)), ("llama", LogitMap())]
)
def test_soft_caps_and_scales_are_recognised(family, logit_map):
    model = tiny.CAUSAL_LMS[family]()
    batch = padded(rows_of(LENGTHS))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)  # where a soft cap bends
    token_losses(model, batch)
    assert loss_module._WAYS[model].logit_map == logit_map


def test_granite_divides_by_its_logits_scaling():
    config = transformers.GraniteConfig(**tiny._DECODER, logits_scaling=8.0)
    torch.manual_seed(0)
    model = transformers.GraniteForCausalLM(config).eval()
    batch = padded(rows_of(LENGTHS))
    torch.testing.assert_close(token_losses(model, batch).mean(), own_loss(model, batch), rtol=1e-6, atol=0)
    assert loss_module._WAYS[model].logit_map == LogitMap(1 / 8)


def test_a_model_that_does_more_takes_the_plain_path_and_says_so_once(caplog):
    model = shifted()
    batch = packed(rows_of(LENGTHS))
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        losses = token_losses(model, batch)
        token_losses(model, batch)
    assert loss_path(model, batch) == "plain"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Shifted: it changes the output head's logits, and not by a scale" in caplog.text
    wanted = own_loss(model, padded(rows_of(LENGTHS)))
    torch.testing.assert_close(losses.mean(), wanted, rtol=1e-5, atol=0)


def test_a_chunked_loss_that_is_off_is_noticed(monkeypatch, caplog):
    """If the chunked loss computed something else, the first batch would show it."""
    monkeypatch.setattr(loss_module, "head_losses", lambda *arguments: head_loss_module.head_losses(*arguments) * 1.01)
    model = tiny.llama()
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        assert loss_path(model, padded(rows_of(LENGTHS))) == "plain"
    assert "its chunked loss is 5." in caplog.text and "where its logits give 5." in caplog.text


def test_a_model_whose_own_loss_has_more_in_it_is_named(caplog):
    config = transformers.MixtralConfig(
        **tiny._DECODER, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
        router_aux_loss_coef=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        assert loss_path(model, padded(rows_of(LENGTHS))) == "chunked"
    assert "is not the cross entropy of its logits" in caplog.text


@pytest.mark.parametrize("path", ["frozen head", "trained head", "plain"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_smoothing_and_z_loss_equal_the_formulas_on_the_models_logits(family, path, small_chunks, monkeypatch):
    model = tiny.CAUSAL_LMS[family]()
    model.get_output_embeddings().requires_grad_(path != "frozen head")
    if path == "plain":
        monkeypatch.setitem(loss_module._WAYS, model, loss_module._Way("plain"))
    batch = padded(rows_of(LENGTHS))
    losses = token_losses(model, batch, BOTH)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    trained = batch.labels[:, 1:] != -100
    chosen, targets = logits[trained], batch.labels[:, 1:][trained]
    wanted = torch.nn.functional.cross_entropy(chosen, targets, reduction="none", label_smoothing=0.1)
    wanted = wanted + 0.01 * chosen.logsumexp(-1) ** 2
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logit_losses(chosen, targets, BOTH), wanted)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(losses.mean(), parameters)
    for one, other in zip(found, torch.autograd.grad(wanted.mean(), parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * max(1.0, other.abs().max().item()))
    assert not torch.allclose(token_losses(model, batch, CROSS_ENTROPY), losses)


def test_an_adapter_around_the_head_is_trained(small_chunks):
    model = tiny.llama().requires_grad_(False)
    batch = padded(rows_of(LENGTHS))
    head = Wrapped(model.lm_head)
    model.lm_head = head
    losses = token_losses(model, batch).mean()
    wanted = own_loss(model, batch)
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=0)
    found = torch.autograd.grad(losses, [head.a, head.b])
    for one, other in zip(found, torch.autograd.grad(wanted, [head.a, head.b]), strict=True):
        torch.testing.assert_close(one, other)


def test_a_head_that_is_wrapped_later_is_noticed():
    model = tiny.llama().requires_grad_(False)
    batch = padded(rows_of(LENGTHS))
    before = token_losses(model, batch)
    model.lm_head = Wrapped(model.lm_head)
    after = token_losses(model, batch)
    assert after.requires_grad and not torch.allclose(before, after)


class LargestLogits(TorchDispatchMode):
    """Records the most rows that any tensor with a vocabulary axis has."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.num_rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary:
                self.num_rows = max(self.num_rows, tensor.numel() // self.vocabulary)
        return output


@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen head", "trained head"])
def test_never_holds_all_logits(trained_head):
    model = tiny.llama()
    model.lm_head.requires_grad_(trained_head)
    batch = packed(rows_of((400, 400, 40)))
    assert batch.num_trained > 2 * CHUNK_ROWS
    token_losses(model, packed(rows_of(LENGTHS)))  # the checks on the first batch
    with LargestLogits(tiny.VOCABULARY) as largest:
        token_losses(model, batch).sum().backward()
    assert largest.num_rows == CHUNK_ROWS


@pytest.mark.parametrize("build", [tiny.llama, tiny.gemma2, shifted])
def test_the_head_sees_only_rows_with_a_label(build):
    model = build()
    batch = packed(rows_of((60, 50)))  # more trained rows than the 32 of the transposed head
    token_losses(model, batch)
    with LargestLogits(tiny.VOCABULARY) as largest, torch.no_grad():
        token_losses(model, batch)
    assert largest.num_rows == batch.num_trained < batch.num_tokens


@pytest.mark.parametrize("family", sorted(tiny.CAUSAL_LMS))
def test_packed_and_padded_losses_are_equal(family):
    model = tiny.CAUSAL_LMS[family]()
    rows = rows_of(LENGTHS)
    torch.testing.assert_close(
        token_losses(model, packed(rows)), token_losses(model, padded(rows)), rtol=1e-5, atol=1e-5
    )


def test_example_losses_belong_to_their_example(llama):
    rows = rows_of(LENGTHS)
    sums, counts = example_losses(llama, packed(rows))
    assert counts.tolist() == [len(labels[1:][labels[1:] != -100]) for _, labels in rows]
    for index, row in enumerate(rows):
        alone = token_losses(llama, padded([row])).double().sum()
        torch.testing.assert_close(sums[index], alone, rtol=1e-5, atol=1e-5)
    sums_padded, counts_padded = example_losses(llama, padded(rows))
    torch.testing.assert_close(sums, sums_padded, rtol=1e-5, atol=1e-5)
    assert torch.equal(counts, counts_padded)
    sums.sum().backward()
    assert llama.model.layers[0].mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_batch_without_labels_has_no_losses(family):
    model = tiny.CAUSAL_LMS[family]()
    losses = token_losses(model, padded([(ids, torch.full_like(ids, -100)) for ids, _ in rows_of((5, 3))]))
    assert losses.shape == (0,)
    losses.sum().backward()


def test_bf16_stays_near_float32_and_at_the_models_own_loss():
    """Losses are summed in float32 from bf16 logits: within 1 % of float32 here, and as the model's own bf16 loss."""
    batch = padded(rows_of(LENGTHS))
    exact, rounded = tiny.llama().requires_grad_(False), tiny.llama().requires_grad_(False).bfloat16()
    found = token_losses(rounded, batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.mean(), own_loss(rounded, batch).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found, token_losses(exact, batch), rtol=1e-2, atol=1e-2)
    gradients = []
    for losses, model in ((lambda m: token_losses(m, batch).mean(), rounded), (lambda m: own_loss(m, batch), rounded)):
        weight = model.model.embed_tokens.weight.requires_grad_()
        gradients.append(torch.autograd.grad(losses(model), weight)[0].float())
    assert (gradients[0] - gradients[1]).norm() <= 0.01 * gradients[1].norm()


def test_no_graph_without_gradients(llama):
    with torch.no_grad():
        assert not token_losses(llama, packed(rows_of(LENGTHS))).requires_grad


def test_the_check_leaves_training_modes_alone(llama):
    llama.train()
    llama.model.layers[1].eval()
    before = [module.training for module in llama.modules()]
    token_losses(llama, padded(rows_of(LENGTHS)))
    assert [module.training for module in llama.modules()] == before
