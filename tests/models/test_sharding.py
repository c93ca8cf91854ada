"""A base spread over two processes computes what the whole one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import rankwise as rw
from rankwise import distributed
from rankwise.attach.inject import adapter_parameters
from rankwise.data.packing import collate
from rankwise.errors import RequestError
from rankwise.models.loss import token_losses
from rankwise.models.sharding import blocks, inside_forward, is_sharded, shard
from rankwise.train.recompute import enable_gradient_checkpointing
from tests import tiny
from tests.processes import Processes
from tests.train.rows import examples

CASES: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "untied, packed, recomputed": {"packing": True, "recompute": True},
    "tied, dora, recomputed": {"tied": True, "use_dora": True, "recompute": True},
    "untied, dora, packed": {"use_dora": True, "packing": True},
    "tied, head trained whole": {"tied": True, "modules_to_save": ["lm_head"]},
    "biases and pissa": {"family": "gpt2", "bias": "all", "init_lora_weights": "pissa"},
    "soft cap": {"family": "gemma2"},
    "mixture": {"family": "mixtral"},
}


def build(family: str = "llama", tied: bool = False, recompute: bool = False, **config: Any) -> Any:
    model = tiny.llama(tied=tied) if family == "llama" else tiny.CAUSAL_LMS[family]()
    torch.manual_seed(1)
    rw.attach(model, rw.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config}))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    if recompute:
        enable_gradient_checkpointing(model)
    return model


def whole_parameters(model: Any) -> list[Tensor]:
    return [*adapter_parameters(model).values(), *model.rankwise_attachment.parameters()]


def _differences(case: dict[str, Any]) -> dict[str, Any]:
    """Four steps of two forward passes each, beside a whole model in the same process; then the bases alone."""
    packing = case.get("packing", False)
    settings = {key: value for key, value in case.items() if key != "packing"}
    model, alone = build(**settings), build(**settings)
    num_whole = sum(parameter.numel() for parameter in model.parameters())
    shard(model, whole_parameters(model), torch.device("cpu"), num_shares=2)
    worst = 0.0
    for step in range(4):
        for each in (model, alone):
            each.train()
            each.zero_grad()
        batches = [collate(examples(5 - part, seed=10 * step + part), 259, packing) for part in range(2)]
        losses = [torch.cat([token_losses(each, batch) for batch in batches]) for each in (model, alone)]
        for loss in losses:
            loss.mean().backward()
        pairs = zip(adapter_parameters(model).values(), adapter_parameters(alone).values(), strict=True)
        worst = max(worst, _apart(*losses), *(_apart(ours.grad, theirs.grad) for ours, theirs in pairs))
        model.eval(), alone.eval()
        with torch.no_grad():
            with rw.disabled(model), rw.disabled(alone):
                worst = max(worst, _apart(token_losses(model, batches[0]), token_losses(alone, batches[0])))
            worst = max(worst, _apart(model(batches[0].input_ids).logits, alone(batches[0].input_ids).logits))
    model.reshard()
    local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    trained = sum(parameter.numel() for parameter in whole_parameters(model))
    return {"worst": worst, "share": (local - trained) / (num_whole - trained), "sharded": is_sharded(model)}


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_losses_gradients_and_the_base_alone_are_those_of_a_whole_model(
    case: dict[str, Any], two_processes: Processes
) -> None:
    found = two_processes(_differences, case)
    for process in found:
        assert process["worst"] == 0.0 and process["sharded"]
    assert sum(process["share"] for process in found) == pytest.approx(1.0)
    assert max(process["share"] for process in found) < 0.6


def _refused() -> list[str]:
    quantised = tiny.llama()
    quantised.get_submodule("model.layers.0.mlp").up_proj.weight = nn.Parameter(
        torch.zeros(48, 32, dtype=torch.uint8), requires_grad=False
    )
    shared = tiny.llama()
    layers = shared.get_submodule("model.layers")
    layers[1].mlp = layers[0].mlp
    messages = []
    for model in (quantised, shared):
        try:
            shard(model, (), torch.device("cpu"), num_shares=2)
        except RequestError as error:
            messages.append(error.message)
    return messages


def test_what_cannot_be_cut_is_refused(two_processes: Processes) -> None:
    quantised, shared = two_processes(_refused)[0]
    assert "can't cut 'model.layers.0.mlp.up_proj.weight' (Parameter, torch.uint8)" in quantised
    assert "set train.sharding=none" in quantised and "'model.layers.0.mlp.gate_proj.weight' is shared" in shared


def test_a_plain_model_just_runs() -> None:
    model = tiny.llama()
    assert inside_forward(model, lambda: 3) == 3 and not is_sharded(model)


def test_blocks_of_each_family(causal_lm: Any) -> None:
    found = blocks(causal_lm)
    assert len(found) == 2 and len({type(block) for block in found}) == 1
    inside = sum(parameter.numel() for block in found for parameter in block.parameters())
    assert inside > 0.2 * causal_lm.num_parameters()


def test_blocks_of_an_encoder_and_decoder() -> None:
    assert len(blocks(tiny.t5())) == 4 and len(blocks(tiny.bert())) == 2
    assert distributed.world_size() == 1
