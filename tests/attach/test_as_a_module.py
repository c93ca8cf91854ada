"""An attached model among torch's own tools: it is freed, replicated and set to modes as any other module."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from rankwise.adapters.config import LoraConfig
from rankwise.attach.attachment import adapter_layers
from rankwise.attach.inject import attach, detach
from tests import tiny
from tests.attach.peft_cases import randomise

IDS = tiny.token_ids()


@pytest.fixture
def no_collector():
    """Without the garbage collector only what nobody holds is freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("again", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_an_attached_model_is_freed_once_nobody_holds_it(no_collector, again):
    model = again(attach(tiny.llama(), LoraConfig(r=2, modules_to_save=["lm_head"])))
    model(input_ids=IDS).logits.sum().backward()
    gc.collect()  # what a pass leaves behind is torch's
    held = [weakref.ref(model), *(weakref.ref(parameter) for parameter in model.parameters())]
    del model
    assert [reference() for reference in held if reference() is not None] == []


def test_detached_layers_are_freed_and_so_is_the_model(no_collector):
    model = attach(tiny.llama(), LoraConfig(r=2))
    wrappers = [weakref.ref(layer) for layer in adapter_layers(model).values()]
    weight = weakref.ref(model.model.layers[0].self_attn.q_proj.weight)
    detach(model)
    assert not any(reference() is not None for reference in wrappers)
    del model
    assert weight() is None


def test_guards_of_a_copy_are_its_own(tmp_path):
    model = attach(tiny.llama(), LoraConfig(r=2))
    twin = copy.deepcopy(model)
    randomise(twin)
    twin.save_pretrained(tmp_path / "twin")
    detach(model)  # the copy's guards do not go with it
    twin.save_pretrained(tmp_path / "again")
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("twin", "again"))
    assert first == second


def replicated(model: nn.Module) -> nn.Module:
    """What `nn.DataParallel` makes for each GPU (torch.nn.parallel.replicate): parameters are plain attributes."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        replica._former_parameters = {}
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else replicas[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.clone())
        for name, buffer in module._buffers.items():
            replica._buffers[name] = None if buffer is None else buffer.clone()
    return replicas[model]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("build", "dtype"), [(tiny.gpt2, torch.float32), (tiny.qwen, torch.bfloat16)])
def test_replicas_of_data_parallel_compute_the_same(build, dtype, grad):
    """Biases included, and layers that share x A^T in bf16: Trainer takes DataParallel where there are several GPUs."""
    model = attach(build().to(dtype), LoraConfig(r=4))
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    expected = model(input_ids=IDS).logits
    with torch.set_grad_enabled(grad):
        found = replicated(model)(input_ids=IDS).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.06)
    if grad:
        found.float().sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_each_part_keeps_its_mode():
    model = tiny.llama().train()
    model.model.layers[0].eval()
    before = {module: module.training for module in model.modules()}
    attach(model, LoraConfig(r=2, lora_dropout=0.5))
    assert all(module.training == mode for module, mode in before.items())
    assert not model.model.layers[0].self_attn.q_proj.training and model.model.layers[1].self_attn.q_proj.training
    detach(model)
    assert {module: module.training for module in model.modules()} == before
