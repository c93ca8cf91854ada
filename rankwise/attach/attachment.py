"""What an attached model remembers: its configuration, and the parameters that stand in for the base's own.

Biases, modules trained whole and replaced embeddings are not wrapped: the module's parameter is exchanged for a copy,
and the original waits here, so the model's names and forwards stay as they are and `disabled` can put it back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, final

from torch import Tensor, nn

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.config import LoraConfig
from rankwise.adapters.tokens import TiedTokenRows, TokenRows
from rankwise.errors import RequestError

ATTRIBUTE = "rankwise_attachment"
"""Name under which an attached model holds its Attachment."""


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
        self.share_left_out = 0.0
        self.largest_left_out: list[str] = []
        self.exchanged: dict[str, bool] = {}
        """Full names of the exchanged parameters and buffers, in order, and whether they are trained."""

    def forward(self, x: Tensor) -> Tensor:
        """Gives `x` back: an attached `nn.Sequential` calls all its children, and this is one."""
        return x

    def exchange(self, model: nn.Module, name: str, trainable: bool) -> None:
        """Puts a copy of `model`'s parameter or buffer `name` in its place and keeps the original.

        Frozen copies of one shared original stay shared (tied embeddings); trained ones are each their own, as in PEFT.
        """
        owner, leaf = owner_of(model, name)
        if leaf in owner._parameters:
            original = owner._parameters[leaf]
            assert original is not None
            copy = nn.Parameter(original.detach().clone(), requires_grad=trainable)
            if not trainable:
                for other in self.exchanged:
                    if not self.exchanged[other] and self._parameters.get(_key(other)) is original:
                        copy = cast(nn.Parameter, self.current(model, other))
            owner._parameters[leaf] = copy
            self.register_parameter(_key(name), original)
        else:
            original_buffer = owner._buffers[leaf]
            assert original_buffer is not None
            owner._buffers[leaf] = original_buffer.detach().clone()
            self.register_buffer(_key(name), original_buffer)
        self.exchanged[name] = trainable

    def swap(self, model: nn.Module) -> None:
        """Exchanges copies and originals; twice is as nothing."""
        for name in self.exchanged:
            owner, leaf = owner_of(model, name)
            if leaf in owner._parameters:
                owner._parameters[leaf], self._parameters[_key(name)] = (
                    self._parameters[_key(name)],
                    owner._parameters[leaf],
                )
            else:
                owner._buffers[leaf], self._buffers[_key(name)] = self._buffers[_key(name)], owner._buffers[leaf]

    def waiting(self, name: str) -> Tensor:
        """Of the two tensors of `name`, the one that is not in place now: the original, unless inside `disabled`."""
        waiting = self._parameters.get(_key(name), self._buffers.get(_key(name)))
        assert waiting is not None
        return waiting

    def current(self, model: nn.Module, name: str) -> Tensor:
        """The tensor that stands in for the original `name`, inside `disabled` as well."""
        if not self.active:
            return self.waiting(name)
        owner, leaf = owner_of(model, name)
        tensor = owner._parameters[leaf] if leaf in owner._parameters else owner._buffers[leaf]
        assert tensor is not None
        return tensor


def _key(name: str) -> str:
    return "original:" + name.replace(".", ":")


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns parameter or buffer `name`, and its name there. Adapter layers are looked through."""
    path, _, leaf = name.rpartition(".")
    owner = model
    for part in path.split(".") if path else ():
        owner = _through(owner)._modules[part]
        assert owner is not None, f"no module '{path}'"
    return _through(owner), leaf


def _through(module: nn.Module) -> nn.Module:
    while isinstance(module, AdapterLayer):
        module = module.base
    return module


def attachment_of(model: nn.Module) -> Attachment | None:
    """The model's Attachment, or None when nothing is attached."""
    found = model._modules.get(ATTRIBUTE)
    return cast(Attachment, found) if found is not None else None


def need_attachment(model: nn.Module) -> Attachment:
    """The model's Attachment. Raises: RequestError when nothing is attached."""
    attachment = attachment_of(model)
    if attachment is None:
        raise RequestError(f"no adapter is attached to this {type(model).__name__}; call rankwise.attach first")
    return attachment


def need_active(model: nn.Module, action: str) -> Attachment:
    """As `need_attachment`. Raises: RequestError inside `disabled` too, where the adapter can't be taken out."""
    attachment = need_attachment(model)
    if not attachment.active:
        raise RequestError(f"can't {action} inside `disabled`; leave the block first")
    return attachment


def file_name(model: nn.Module, name: str) -> str:
    """A base tensor's name in PEFT's file: inside a wrapped layer it moves below `base_layer`."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, (TokenRows, TiedTokenRows)):
        return f"{path}.token_adapter.base_layer.{leaf}"
    return f"{path}.base_layer.{leaf}" if isinstance(owner, AdapterLayer) else name


@final
class AdapterSaver:
    """Stands in for `save_pretrained` of an attached model: writes the adapter folder.

    Takes the arguments that transformers' Trainer passes; those that would need the whole model are refused.
    """

    def __init__(self, model: nn.Module, save: Callable[[nn.Module, str], None]) -> None:
        self.model = model
        self.save = save

    def __call__(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,  # Trainer passes the model's own
        push_to_hub: bool = False,
        max_shard_size: Any = None,  # adapters are one file
        safe_serialization: bool = True,
    ) -> None:
        """Writes `adapter_config.json` and `adapter_model.safetensors` into `save_directory`."""
        if push_to_hub:
            raise RequestError("push_to_hub=True: call push_to_hub(repo_id) of the attached model instead")
        if not safe_serialization:
            raise RequestError(
                "safe_serialization=False would write a pickle file; adapters are saved as safetensors only"
            )
        if is_main_process:
            self.save(self.model, str(save_directory))


@final
class AdapterPusher:
    """Stands in for `push_to_hub` of an attached model: uploads the adapter folder."""

    def __init__(self, model: nn.Module, save: Callable[[nn.Module, str], None]) -> None:
        self.model = model
        self.save = save

    def __call__(
        self, repo_id: str, commit_message: str = "Upload LoRA adapter", private: bool | None = None,
        token: str | bool | None = None, revision: str | None = None,
    ) -> str:  # fmt: skip
        """Creates the repository if need be and uploads the folder; returns the commit's address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save(self.model, folder)
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision
            )
        return str(done)


@final
class VocabularyGuard:
    """Stands in for `resize_token_embeddings` of an attached model: vocabulary changes come before attaching."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, new_num_tokens: int | None = None, *more: Any, **named: Any) -> nn.Module:
        """Raises: RequestError when a size is asked for; with none it returns the input embedding, as transformers."""
        if new_num_tokens is None:
            embedding = self.model.get_input_embeddings()  # type: ignore[operator]
            assert isinstance(embedding, nn.Module)
            return embedding
        raise RequestError(
            f"resize_token_embeddings({new_num_tokens}) on an attached model would replace adapted layers; "
            "detach, resize, and attach again"
        )


@final
class TieGuard:
    """Stands in for `tie_weights` of an attached model: what is tied is so already, and an adapter may part it."""

    def __call__(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Does nothing: transformers would put base weights where wrapped or trained ones are."""
