"""Objectives with heads: k micro batches are one batch, and the contrastive loss is the textbook's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import adapter_parameters, attach
from rankwise.data.head_batches import collate_texts
from rankwise.evaluate.perplexity import measure_loss
from rankwise.models.embedding import embed
from rankwise.models.labels import Labels
from rankwise.train.loop import accumulate
from rankwise.train.needs import NEEDS
from rankwise.train.objective import means
from rankwise.train.objectives import OBJECTIVES, contrastive
from rankwise.train.optimizers import make_optimizer
from tests import tiny
from tests.train.labelled import KINDS, OBJECTIVE, examples

CLASSES = {
    "classification": transformers.BertForSequenceClassification,
    "token-classification": transformers.BertForTokenClassification,
    "embedding": transformers.BertModel,
}


def adapted(kind: str, dropout: float = 0.0) -> PreTrainedModel:
    """A tiny encoder with the kind's head and an adapter that is not at its start."""
    objective = OBJECTIVE[kind]
    labels = Labels(("a", "b", "c") if kind == "labels" else ("a", "b"), kind == "labels")
    architecture = tiny.encoder(dropout).config
    architecture.update({} if kind == "pairs" else labels.to_config())
    torch.manual_seed(0)
    model = CLASSES[objective](architecture)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, task_type=NEEDS[objective].task_type)
    attach(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(kind: str, path: Path, sizes: list[int], dropout: float = 0.0) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step whose micro batches have these sizes."""
    objective, model = OBJECTIVES[OBJECTIVE[kind]], adapted(kind, dropout).train()
    chosen, batches = iter(examples(path, kind, sum(sizes))), []
    for size in sizes:
        batches.append(objective.collate([next(chosen) for _ in range(size)], 0, False))
    optimizer = make_optimizer(adapter_parameters(model), 1e-2, (0.9, 0.999), 0.0)
    torch.manual_seed(3)
    loss, num_trained, _ = accumulate(model, optimizer, batches, objective, 1)
    assert num_trained == sum(batch.num_trained for batch in batches)
    found = {name: p.grad for name, p in adapter_parameters(model).items() if p.grad is not None}
    return loss, found


@pytest.mark.parametrize("sizes", [[1] * 8, [3, 3, 2], [4, 4]])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_equal_the_big_batch(kind: str, sizes: list[int], tmp_path: Path) -> None:
    loss, whole = gradients(kind, tmp_path / "rows", [8])
    split_loss, split = gradients(kind, tmp_path / "rows", sizes)
    assert loss == pytest.approx(split_loss, rel=1e-6)
    assert whole.keys() == split.keys() and any("lora_B" in name for name in whole)
    assert kind == "pairs" or any("classifier" in name for name in whole)
    for name, gradient in whole.items():
        assert kind == "pairs" or gradient.abs().max() > 0, name
        scale = max(1.0, float(gradient.abs().max()))  # of a temperature of 0.05, gradients are large
        assert (split[name] - gradient).abs().max() <= 1e-6 * scale, name


def test_the_second_encoding_has_the_dropout_of_the_first(tmp_path: Path) -> None:
    """With dropout the cached gradient belongs to the vectors of the first pass: the second must draw the same."""
    model, rows = adapted("pairs", dropout=0.3).train(), examples(tmp_path / "rows", "pairs", 6)
    objective = OBJECTIVES["embedding"]
    batches = [objective.collate(rows[:3], 0, False), objective.collate(rows[3:], 0, False)]
    with torch.no_grad():  # the first batch proves that padding can be left out, and is read more than once
        embed(model, batches[0].input_ids, batches[0].attention_mask, "mean")
    seen: list[Tensor] = []
    model.register_forward_hook(lambda module, arguments, output: seen.append(output[0].detach().clone()))
    torch.manual_seed(5)
    for losses in objective.losses_of(model, batches):
        losses.sum().backward()
    after = torch.rand(1)
    assert len(seen) == 4
    for first, second in ((seen[0], seen[2]), (seen[1], seen[3])):  # with and without a graph they may round apart
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    torch.manual_seed(5)
    with torch.no_grad():
        for batch in batches:
            embed(model, batch.input_ids, batch.attention_mask, "mean")
    assert torch.equal(torch.rand(1), after)  # and what is drawn next is as after one pass


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_the_contrastive_loss_by_hand(pooling: str, tmp_path: Path) -> None:
    model, rows = adapted("pairs").eval(), examples(tmp_path / "rows", "pairs", 5)
    batch = collate_texts(rows, 0, False)
    objective = contrastive(pooling, 0.1)
    losses = next(objective.losses_of(model, [batch]))
    with torch.no_grad():
        hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
    vectors = []
    for states, mask in zip(hidden, batch.attention_mask, strict=True):
        states = states[mask.bool()]
        vectors.append({"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling])
    unit = F.normalize(torch.stack(vectors), dim=-1)
    torch.testing.assert_close(embed(model, batch.input_ids, batch.attention_mask, pooling), unit)
    similar = unit[:5] @ unit[5:].T / 0.1
    torch.testing.assert_close(losses, F.cross_entropy(similar, torch.arange(5), reduction="none"))
    sums: dict[str, list[float]] = {}
    objective.meter.pour(sums)
    ranks = (similar >= similar.gather(1, torch.arange(5)[:, None])).sum(1).double()
    assert means(sums) == pytest.approx(
        {"recall_at_1": float((ranks == 1).double().mean()), "mrr": float((1 / ranks).mean())}
    )


def test_the_same_text_is_no_negative_of_itself(tmp_path: Path) -> None:
    """A positive that another row has too, and the anchor as another row's positive, are left out of the sum."""
    rows = examples(tmp_path / "rows", "pairs", 3)
    model, objective = adapted("pairs").eval(), OBJECTIVES["embedding"]
    twice = next(objective.losses_of(model, [objective.collate([rows[0], rows[0], rows[1]], 0, False)]))
    once = next(objective.losses_of(model, [objective.collate([rows[0], rows[1]], 0, False)]))
    torch.testing.assert_close(twice[:2], once[[0, 0]])


def test_all_rows_are_candidates_of_an_evaluation(tmp_path: Path) -> None:
    """Validation does not depend on how many rows are encoded at a time."""
    model, rows = adapted("pairs").eval(), examples(tmp_path / "rows", "pairs", 7)
    found = [measure_loss(model, OBJECTIVES["embedding"], rows, 0, size, False) for size in (7, 2)]
    assert found[0].loss == pytest.approx(found[1].loss, abs=1e-6) and found[0].num_units == 7
    assert found[0].figures == pytest.approx(found[1].figures) and set(found[0].figures) == {"recall_at_1", "mrr"}


def test_several_labels_are_torchs_mean(tmp_path: Path) -> None:
    model, rows = adapted("labels").eval(), examples(tmp_path / "rows", "labels", 5)
    objective = OBJECTIVES["classification"]
    batch = objective.collate(rows, 0, False)
    mine = objective.losses(model, batch).mean()
    theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.targets.float()).loss
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["label", "tags"])
def test_the_loss_is_the_models_own(kind: str, tmp_path: Path) -> None:
    model, rows = adapted(kind).eval(), examples(tmp_path / "rows", kind, 5)
    objective = OBJECTIVES[OBJECTIVE[kind]]
    batch = objective.collate(rows, 0, False)
    theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.targets).loss
    torch.testing.assert_close(objective.losses(model, batch).mean(), theirs)
