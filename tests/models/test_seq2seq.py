from __future__ import annotations

import logging

import pytest
import torch
from transformers import PreTrainedModel

from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import adapter_parameters, attach
from rankwise.models.seq2seq import Seq2SeqBatch, decoder_inputs, seq2seq_losses
from tests import tiny

PAD = 259
LENGTHS = ((7, 3), (2, 9), (12, 1))


def rows() -> list[tuple[list[int], list[int]]]:
    return [
        (tiny.token_ids(1, asked, asked)[0].tolist(), tiny.token_ids(1, told, 50 + told)[0].tolist())
        for asked, told in LENGTHS
    ]


def batch_of(chosen: list[tuple[list[int], list[int]]]) -> Seq2SeqBatch:
    asked, told = max(len(a) for a, _ in chosen), max(len(t) for _, t in chosen)
    fills = ((asked, PAD), (asked, 0), (told, -100))
    ids, mask, labels = (torch.full((len(chosen), width), fill) for width, fill in fills)
    for row, (question, answer) in enumerate(chosen):
        ids[row, : len(question)], mask[row, : len(question)] = torch.tensor(question), 1
        labels[row, : len(answer)] = torch.tensor(answer)
    return Seq2SeqBatch(ids, mask, labels)


def own_loss(model: PreTrainedModel, question: list[int], answer: list[int]) -> torch.Tensor:
    """transformers' own loss of one row without padding."""
    return model(input_ids=torch.tensor([question]), labels=torch.tensor([answer])).loss


@pytest.mark.parametrize("name", tiny.SEQ2SEQ_LMS)
def test_equals_transformers_own_loss_row_by_row(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """So padding takes no part, on either side, and the shift is the model's."""
    model = tiny.SEQ2SEQ_LMS[name]()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        losses = seq2seq_losses(model, batch_of(rows()))
    assert not caplog.records, "the chunked way was not taken"
    assert losses.dtype == torch.float32 and losses.shape == (sum(told for _, told in LENGTHS),)
    for (question, answer), found in zip(rows(), losses.split([told for _, told in LENGTHS]), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(found.mean(), own_loss(model, question, answer), rtol=1e-5, atol=1e-6)


def test_the_scale_of_a_tied_t5_takes_part() -> None:
    """A tied head reads the decoder's output times d_model ** -0.5; forgetting it is a large error."""
    model = tiny.t5()
    head = model.get_output_embeddings()
    batch = batch_of(rows()[:1])
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        expected = seq2seq_losses(model, batch)
        hook = model.decoder.register_forward_hook(lambda _, inputs, output: seen.append(output[0]))
        seq2seq_losses(model, batch)
        hook.remove()
        unscaled = torch.nn.functional.cross_entropy(head(seen[0])[0], batch.labels[0], reduction="none")
    assert float((unscaled - expected).abs().max()) > 0.1


@pytest.mark.parametrize("name", tiny.SEQ2SEQ_LMS)
def test_gradients_equal_those_of_the_models_own_loss(name: str) -> None:
    gradients = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = attach(tiny.SEQ2SEQ_LMS[name](), LoraConfig(r=4, init_lora_weights=False))
        if ours:
            loss = seq2seq_losses(model, batch_of(rows())).sum()
        else:
            loss = torch.stack([own_loss(model, *row) * len(row[1]) for row in rows()]).sum()
        loss.backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(model).items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        own = gradients[1][name]
        assert float((gradient - own).norm() / own.norm()) < 1e-3, name


def test_the_logits_of_a_batch_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.t5()
    seq2seq_losses(model, batch_of(rows()))  # the proof runs the model once

    def forward(*args: object, **named: object) -> None:
        raise AssertionError("the whole model ran")

    monkeypatch.setattr(type(model), "forward", forward)
    assert seq2seq_losses(model, batch_of(rows())).isfinite().all()


def test_a_bias_on_the_logits_takes_the_plain_path_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.bart()
    with torch.no_grad():
        model.final_logits_bias.normal_()
        with caplog.at_level(logging.WARNING):
            losses = seq2seq_losses(model, batch_of(rows()))
        assert "more than its output head" in caplog.text
        question, answer = rows()[0]
        own = own_loss(model, question, answer)
        torch.testing.assert_close(losses[: len(answer)].mean(), own, rtol=1e-5, atol=1e-6)


def test_counts_leave_padding_out() -> None:
    batch = batch_of(rows())
    assert (batch.num_examples, batch.num_trained, batch.num_tokens) == (3, 13, 21 + 13)
    assert decoder_inputs(tiny.t5(), batch.labels)[0].tolist()[:2] == [PAD, rows()[0][1][0]]
