"""Head losses against F.cross_entropy and the z-loss's formula, with their gradients, for every kind of head."""

import pytest
import torch
from torch import nn

from rankwise.models import head_loss as head_loss_module
from rankwise.models.head_loss import AS_IT_IS, CROSS_ENTROPY, LogitMap, LossTerms, head_losses, is_frozen_linear

TERMS = {
    "plain": CROSS_ENTROPY,
    "smoothed": LossTerms(label_smoothing=0.2),
    "z-loss": LossTerms(z_loss=0.05),
    "both": LossTerms(label_smoothing=0.3, z_loss=0.02),
}
MAPS = {"as it is": AS_IT_IS, "scale": LogitMap(0.25), "cap": LogitMap(cap=1.5), "scaled cap": LogitMap(2.0, 1.5)}


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


def heads() -> dict[str, nn.Module]:
    return {
        "frozen": nn.Linear(5, 11, bias=False).requires_grad_(False),
        "frozen with bias": nn.Linear(5, 11).requires_grad_(False),
        "trained": nn.Linear(5, 11),
        "wrapped": Wrapped(nn.Linear(5, 11).requires_grad_(False)),
    }


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(head_loss_module, "CHUNK_ROWS", 3)
    monkeypatch.setattr(head_loss_module, "BLOCK_ROWS", 2)


def reference(head: nn.Module, rows: torch.Tensor, targets: torch.Tensor, terms: LossTerms, logit_map: LogitMap):
    """The formulas, spelled out."""
    logits = head(rows) * logit_map.scale
    if logit_map.cap is not None:
        logits = logit_map.cap * torch.tanh(logits / logit_map.cap)
    losses = nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=terms.label_smoothing)
    return losses + terms.z_loss * torch.log(logits.exp().sum(-1)) ** 2


@pytest.mark.parametrize("logit_map", MAPS.values(), ids=MAPS.keys())
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
@pytest.mark.parametrize("kind", sorted(heads()))
def test_losses_and_gradients_in_double_precision(kind, terms, logit_map, small_chunks):
    head = heads()[kind].double()
    assert is_frozen_linear(head) == kind.startswith("frozen")
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    for num_rows in (1, 3, 7):
        rows = torch.randn(num_rows, 5, dtype=torch.float64, requires_grad=True)
        targets = torch.randint(11, (num_rows,))
        weights = torch.linspace(0.5, 1.5, num_rows, dtype=torch.float64)
        found = head_losses(head, rows, targets, terms, logit_map)
        wanted = reference(head, rows, targets, terms, logit_map)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        for one, other in zip(
            torch.autograd.grad((found * weights).sum(), [rows, *trained]),
            torch.autograd.grad((wanted * weights).sum(), [rows, *trained]),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
@pytest.mark.parametrize("kind", ["frozen with bias", "wrapped"])
def test_gradcheck(kind, terms, small_chunks):
    head = heads()[kind].double()
    rows = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (4,))
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    assert torch.autograd.gradcheck(
        lambda rows, *_: head_losses(head, rows, targets, terms, LogitMap(0.5, 2.0)), (rows, *trained)
    )


@pytest.mark.parametrize("kind", sorted(heads()))
def test_no_rows_have_no_losses(kind):
    head = heads()[kind]
    losses = head_losses(head, torch.randn(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    assert losses.shape == (0,)
    losses.sum().backward()


def test_a_head_with_hooks_is_called_as_a_module():
    head = nn.Linear(5, 11).requires_grad_(False)
    head.register_forward_hook(lambda module, arguments, output: output * 2)
    rows, targets = torch.randn(4, 5), torch.randint(11, (4,))
    wanted = nn.functional.cross_entropy(head(rows), targets, reduction="none")
    torch.testing.assert_close(head_losses(head, rows, targets), wanted)


def test_a_sure_row_has_a_finite_loss_and_no_gradient():
    """The gradient of a row that is all but certain is the small difference p - 1, not a rounded 0 or nan."""
    head = nn.Linear(1, 3, bias=False).requires_grad_(False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[400.0], [0.0], [-400.0]]))
    rows = torch.ones(2, 1, requires_grad=True)
    losses = head_losses(head, rows, torch.tensor([0, 2]))
    assert losses.tolist() == [0.0, 800.0]
    losses.sum().backward()
    assert rows.grad is not None and rows.grad.tolist() == [[0.0], [800.0]]


def test_blocks_and_chunks_give_the_same_to_the_last_bit(monkeypatch):
    head = nn.Linear(8, 50).requires_grad_(False)
    rows, targets = torch.randn(40, 8), torch.randint(50, (40,))
    whole = head_losses(head, rows, targets)
    monkeypatch.setattr(head_loss_module, "BLOCK_ROWS", 7)
    assert torch.equal(head_losses(head, rows, targets), whole)


@pytest.mark.unchecked
@pytest.mark.parametrize("terms", [CROSS_ENTROPY, LossTerms(0.1, 1e-3)], ids=["plain", "both"])
def test_torch_compile_breaks_no_graph_in_the_chunked_loss(terms, monkeypatch):
    monkeypatch.setattr(head_loss_module, "CHUNK_ROWS", 16)
    head = nn.Linear(8, 50, bias=False).requires_grad_(False)
    rows, targets = torch.randn(40, 8, requires_grad=True), torch.randint(50, (40,))
    whole = torch.compile(
        lambda rows: head_losses(head, rows, targets, terms).mean(), fullgraph=True, backend="aot_eager"
    )
    loss = whole(rows)
    (found,) = torch.autograd.grad(loss, rows)
    wanted = head_losses(head, rows, targets, terms).mean()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, rows)[0])
