"""What an attached model remembers: its configuration, and the parameters that stand in for the base's own.

Biases, modules trained whole and replaced embeddings are not wrapped: the module's parameter is exchanged for a copy,
and the original waits here, so the model's names and forwards stay as they are and `disabled` can put it back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast, final

from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.config import LoraConfig
from rankwise.adapters.mixture import Mixture
from rankwise.adapters.tokens import TokenRows
from rankwise.attach.wide import is_narrow
from rankwise.errors import RequestError

ATTRIBUTE = "rankwise_attachment"
"""Name under which an attached model holds its Attachment."""

WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
"""Modules of torch around a whole model (`torch.compile` gives the first), and where in them it is."""


@final
class Attachment(nn.Module):
    """Held by the attached model as a submodule, so that the originals move with it."""

    def __init__(self, config: LoraConfig, requires_grad: dict[str, bool]) -> None:
        super().__init__()
        self.config = config
        self.requires_grad_before = requires_grad
        self.active = True
        """False inside `disabled`."""
        self.holds_embeddings = False
        """Whether the adapter's folder held the whole embeddings (a changed vocabulary), and will again."""
        self.vocabulary_before: int | None = None
        """Rows of the plain model's embeddings, where loading has changed their number."""
        self.head: dict[str, Any] | None = None
        """What the folder's `head.json` says: names of classes, or how an embedding is pooled."""
        self.nested: dict[str, Any] | None = None
        """What the folder's `nested.json` says: every prefix of the ranks, from a least one, works alone."""
        self.mixture: Mixture | None = None
        """Of a gate or a task embedding: whose adapters take part (`rankwise.attach.gates`)."""
        self.members: dict[str, LoraConfig] = {}
        """The configurations of a gate's adapters, by name."""
        self.bases: dict[str, dict[str, Any]] = {}
        """What the provenance of a gate's adapters says of their base, by name, where there is one."""
        self.share_left_out = 0.0
        self.largest_left_out: list[str] = []
        self.unpacked: list[nn.Module] = []
        """4-bit layers that may repack their weights once the adapter is gone (see `rankwise.quantized`)."""
        self.exchanged: dict[str, bool] = {}
        """Full names of the exchanged parameters and buffers, in order, and whether they are trained."""
        self._places: dict[str, tuple[dict[str, Tensor], str]] | None = None
        """Where the layers' parameters are, by their names in PEFT's file: the layer's own dict, and the key there."""

    def forward(self, x: Tensor) -> Tensor:
        """Gives `x` back: an attached `nn.Sequential` calls all its children, and this is one."""
        return x

    def exchange(self, model: nn.Module, name: str, trainable: bool, widen: bool = False) -> None:
        """Puts a copy of `model`'s parameter or buffer `name` in its place and keeps the original.

        With `widen` the copy of a bf16 or fp16 tensor is fp32. Frozen copies of one shared original stay shared (tied
        embeddings); trained ones are each their own, as in PEFT.
        """
        slot, leaf = _slot(model, name)
        original = slot[leaf]
        twins = [other for other, trained in self.exchanged.items() if not trained and self.waiting(other) is original]
        content = original.detach().clone()
        if widen and is_narrow(content):
            content = content.float()
        if twins and not trainable:
            copy = self.current(model, twins[0])
        elif isinstance(original, nn.Parameter):
            copy = nn.Parameter(content, requires_grad=trainable)
        else:
            copy = content
        self.keep(f"original:{name}", original)
        slot[leaf] = copy
        self.exchanged[name] = trainable

    def saved_parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter layers' parameters by their names in PEFT's file, without a walk through the model.

        The layers are found once; a parameter that was replaced since (a growth of ranks) is the one found.
        """
        if self._places is None:
            self._places = {
                f"{name}.{key}": _place(layer, parameter)
                for name, layer in adapter_layers(model).items()
                for key, parameter in layer.peft_parameters().items()
            }
        return {name: slot[leaf] for name, (slot, leaf) in self._places.items()}

    def swap(self, model: nn.Module) -> None:
        """Exchanges copies and originals; twice is as nothing."""
        for name in self.exchanged:
            (slot, leaf), (kept, key) = _slot(model, name), self._kept(f"original:{name}")
            slot[leaf], kept[key] = kept[key], slot[leaf]

    def waiting(self, name: str) -> Tensor:
        """Of the two tensors of `name`, the one that is not in place now: the original, unless inside `disabled`."""
        return self.kept(f"original:{name}")

    def current(self, model: nn.Module, name: str) -> Tensor:
        """The tensor that stands for `name` with the adapter, inside `disabled` as well."""
        if name in self.exchanged and not self.active:
            return self.waiting(name)
        slot, leaf = _slot(model, name)
        return slot[leaf]

    def keep(self, name: str, tensor: Tensor) -> None:
        """Keeps `tensor` under `name`, which may have dots."""
        register = self.register_parameter if isinstance(tensor, nn.Parameter) else self.register_buffer
        register(name.replace(".", ":"), tensor)  # type: ignore[arg-type]

    def kept(self, name: str) -> Tensor:
        """What `keep` was given."""
        slot, key = self._kept(name)
        return slot[key]

    def _kept(self, name: str) -> tuple[dict[str, Tensor], str]:
        key = name.replace(".", ":")
        return cast(dict[str, Tensor], self._parameters if key in self._parameters else self._buffers), key


def _slot(model: nn.Module, name: str) -> tuple[dict[str, Tensor], str]:
    """The dict that holds parameter or buffer `name`, and its key there. Adapter layers are looked through."""
    path, _, leaf = name.rpartition(".")
    owner = model
    for part in path.split(".") if path else ():
        owner = cast(nn.Module, base_of(owner)._modules[part])
    owner = base_of(owner)
    return cast(dict[str, Tensor], owner._parameters if leaf in owner._parameters else owner._buffers), leaf


def _place(layer: nn.Module, parameter: nn.Parameter) -> tuple[dict[str, Tensor], str]:
    """Which of the layer's own parameters this is; a gate has lists of them."""
    for module in (layer, *layer.children()):
        own = cast(dict[str, Tensor], module._parameters)
        for leaf, tensor in own.items():
            if tensor is parameter:
                return own, leaf
    raise AssertionError("a parameter that the layer does not have")


def base_of(module: nn.Module) -> nn.Module:
    """The base of an adapter layer; any other module is its own."""
    return module.base if isinstance(module, AdapterLayer) else module


def attachment_of(model: nn.Module) -> Attachment | None:
    """The model's Attachment, or None when nothing is attached."""
    return cast(Attachment | None, model._modules.get(ATTRIBUTE))


def need_attachment(model: nn.Module) -> Attachment:
    """The model's Attachment. Raises: RequestError when nothing is attached."""
    attachment = attachment_of(model)
    if attachment is None:
        refuse_wrapper(model)
        raise RequestError(f"no adapter is attached to this {type(model).__name__}; call rankwise.attach first")
    return attachment


def refuse_wrapper(model: nn.Module) -> None:
    """Raises: RequestError for a wrapper around a model, under whose names an adapter would be of no use elsewhere."""
    kind = type(model)
    if kind.__module__.startswith("torch.") and kind.__name__ in WRAPPERS:
        raise RequestError(
            f"this {kind.__name__} is torch's wrapper around a model: give the model inside, .{WRAPPERS[kind.__name__]}"
            " (attach first, wrap or compile then)"
        )


def need_active(model: nn.Module, action: str) -> Attachment:
    """As `need_attachment`. Raises: RequestError inside `disabled` too, where the adapter can't be taken out."""
    attachment = need_attachment(model)
    if not attachment.active:
        raise RequestError(f"can't {action} inside `disabled`; leave the block first")
    return attachment


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers by the name of the layer that they wrap, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """The plain model's parameters, by its own names, with the module or adapter layer there. Shared ones come again.

    Exchanged ones are those in place now.
    """
    wrapped = {layer.base for layer in adapter_layers(model).values()}
    for name, module in model.named_modules():
        if module not in wrapped and not isinstance(module, Attachment):
            for leaf, parameter in base_of(module)._parameters.items():
                if parameter is not None:
                    yield f"{name}.{leaf}" if name else leaf, module, parameter


def file_name(model: nn.Module, name: str) -> str:
    """A base tensor's name in PEFT's file: inside a wrapped layer it moves below `base_layer`."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, TokenRows):
        return f"{path}.token_adapter.base_layer.{leaf}"
    return f"{path}.base_layer.{leaf}" if isinstance(owner, AdapterLayer) else name


def replace_modules(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> None:
    """Puts the replacement wherever a module of `replacements` stands in the tree: a shared module has several."""
    for parent in list(model.modules()):
        if parent in replacements:
            continue  # a wrapper's own `base`
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """After an error in the block the model is as before, whatever was attached, detached or resized in it.

    Values are not copied: what is written into tensors in place is not undone.
    """
    modules = list(model.modules())
    contents = [vars(module) for module in modules]
    contents += [d for module in modules for d in (module._modules, module._parameters, module._buffers)]
    hooks = [d for module in modules for d in (module._forward_hooks, module._forward_pre_hooks)]
    if isinstance(model, PreTrainedModel):
        contents.append(vars(model.config.get_text_config()))
    before = [(content, dict(content)) for content in contents]
    hooks_before = [(content, dict(content)) for content in hooks]
    parameters = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for content, was in before:
            content.clear()
            content.update(was)
        for content, was in hooks_before:
            content.clear()
            content.update(was)
        for parameter, data, requires_grad in parameters:
            parameter.data = data  # transformers resizes embeddings in place
            parameter.requires_grad_(requires_grad)
        raise
