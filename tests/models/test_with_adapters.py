"""Packing and the chunked loss on a model that carries adapters, the output head's included."""

import pytest
import torch

from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import adapter_parameters, attach
from rankwise.models.head_loss import is_frozen_linear
from rankwise.models.loss import loss_path, token_losses
from tests import tiny
from tests.models.batches import packed, padded, rows_of

LENGTHS = (19, 5, 1, 12)


def attached(family: str, targets):
    model = attach(tiny.CAUSAL_LMS[family](), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("family", sorted(tiny.CAUSAL_LMS))
def test_packed_losses_and_adapter_gradients_equal_the_models_own(family):
    model = attached(family, "all-linear")
    rows = rows_of(LENGTHS)
    losses = token_losses(model, packed(rows)).mean()
    batch = padded(rows)
    wanted = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-6)
    parameters = list(adapter_parameters(model).values())
    for found, reference in zip(
        torch.autograd.grad(losses, parameters), torch.autograd.grad(wanted, parameters), strict=True
    ):
        torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-6)


def test_an_adapted_head_is_called_not_bypassed():
    model = attached("llama", ["q_proj", "lm_head"])
    head = model.get_output_embeddings()
    assert head is not None and not is_frozen_linear(head)
    batch = padded(rows_of(LENGTHS))
    losses = token_losses(model, batch).mean()
    assert loss_path(model, batch) == "chunked"
    wanted = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=0)
    losses.backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(model).values())
