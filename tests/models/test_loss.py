"""The chunked loss equals the model's own loss, with its gradients, and never holds all logits."""

import logging

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rankwise.models import loss as loss_module
from rankwise.models.loss import CHUNK_ROWS, example_losses, head_losses, is_frozen_linear, loss_path, token_losses
from tests import tiny
from tests.models.batches import packed, padded, rows_of

LENGTHS = (19, 5, 1, 12)
PLAIN = {"gemma2", "cohere"}


class Wrapped(nn.Module):
    """A head as an adapter wraps it: the frozen base, a low-rank change, and the base's weight under its old name."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(4, base.in_features) * 0.1)
        self.b = nn.Parameter(torch.randn(base.out_features, 4) * 0.1)

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 3)


def heads() -> dict[str, nn.Module]:
    frozen = nn.Linear(5, 11, bias=False).requires_grad_(False)
    return {
        "frozen": frozen,
        "frozen with bias": nn.Linear(5, 11).requires_grad_(False),
        "trained": nn.Linear(5, 11),
        "wrapped": Wrapped(nn.Linear(5, 11).requires_grad_(False)),
    }


@pytest.mark.parametrize("kind", sorted(heads()))
@pytest.mark.parametrize("num_rows", [0, 1, 3, 7])
def test_head_losses_gradients_in_double_precision(kind, num_rows, small_chunks):
    head = heads()[kind].double()
    assert is_frozen_linear(head) == kind.startswith("frozen")
    rows = torch.randn(num_rows, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (num_rows,))
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    assert torch.autograd.gradcheck(lambda rows, *_: head_losses(head, rows, targets), (rows, *trained))
    wanted = nn.functional.cross_entropy(head(rows), targets, reduction="none")
    torch.testing.assert_close(head_losses(head, rows, targets), wanted)


def test_a_head_with_hooks_is_called_as_a_module():
    head = nn.Linear(5, 11).requires_grad_(False)
    head.register_forward_hook(lambda module, arguments, output: output * 2)
    rows, targets = torch.randn(4, 5), torch.randint(11, (4,))
    wanted = nn.functional.cross_entropy(head(rows), targets, reduction="none")
    torch.testing.assert_close(head_losses(head, rows, targets), wanted)


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


@pytest.mark.parametrize("family", sorted(tiny.CAUSAL_LMS))
def test_heads_that_do_more_take_the_plain_path_and_say_so_once(family, caplog):
    model = tiny.CAUSAL_LMS[family]()
    batch = packed(rows_of(LENGTHS))
    with caplog.at_level(logging.WARNING, logger="rankwise.models.loss"):
        token_losses(model, batch)
        token_losses(model, batch)
    assert loss_path(model, batch) == ("plain" if family in PLAIN else "chunked")
    assert [record.levelname for record in caplog.records] == (["WARNING"] if family in PLAIN else [])


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


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_head_sees_only_rows_with_a_label(family):
    model = tiny.CAUSAL_LMS[family]()
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
        torch.testing.assert_close(sums[index], token_losses(llama, padded([row])).sum(), rtol=1e-5, atol=1e-5)
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
