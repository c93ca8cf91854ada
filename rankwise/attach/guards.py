"""Methods of a transformers model that would do harm to an attached one, and what stands in for them.

They are functions with the model as their first argument, bound by `Guard`: copies and pickles of an attached model
have their own, and the model does not hold itself, so that its memory is free once nobody else holds it.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from typing import Any, final

from torch import nn
from transformers import PreTrainedModel

from rankwise.errors import RequestError, did_you_mean

WITHOUT_EFFECT = ("state_dict", "max_shard_size", "token", "save_original_format", "distributed_checkpoint")
"""Arguments of transformers' `save_pretrained` that its own callers pass and that mean nothing to an adapter: its
tensors are the model's own, in one file."""

REFUSED = {
    "push_to_hub": (False, "call push_to_hub(repo_id) of the attached model instead"),
    "safe_serialization": (True, "adapters are saved as safetensors, never as pickle"),
    "save_peft_format": (True, "an adapter has PEFT's format and no other"),
    "variant": (None, "an adapter's file has one name"),
}
"""Other arguments: the one value that they may have, and why."""


def save_pretrained(
    model: nn.Module, save_directory: str | os.PathLike[str], is_main_process: bool = True, **named: Any
) -> None:
    """Writes the adapter folder. Takes transformers' own arguments where they mean something, or nothing.

    Raises: RequestError for others, and for what would need the whole model.
    """
    from rankwise.attach.checkpoint import save_adapter

    for name, value in named.items():
        if name in REFUSED and value != REFUSED[name][0]:
            raise RequestError(f"save_pretrained({name}={value!r}) of an attached model: {REFUSED[name][1]}")
        if name not in (*REFUSED, *WITHOUT_EFFECT):
            known = (*REFUSED, *WITHOUT_EFFECT, "is_main_process")
            raise RequestError(f"save_pretrained of an attached model takes no '{name}'{did_you_mean(name, known)}")
    if is_main_process:
        save_adapter(model, save_directory)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    **named: Any,
) -> str:
    """Creates the repository if need be and uploads the adapter folder; returns the commit's address.

    Raises: RequestError for arguments of transformers' `push_to_hub` that an upload of an adapter does not know.
    """
    from huggingface_hub import HfApi

    for name in named:
        if name not in ("commit_description", "create_pr", "max_shard_size"):
            raise RequestError(
                f"push_to_hub of an attached model takes no '{name}'; save_adapter and huggingface_hub's upload_folder "
                "know every option"
            )
    more = {name: value for name, value in named.items() if name != "max_shard_size"}  # an adapter is one file
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        message = commit_message or "Upload LoRA adapter"
        done = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision, **more)
    return str(done)


def resize_token_embeddings(
    model: PreTrainedModel, new_num_tokens: int | None = None, *more: Any, **named: Any
) -> nn.Module:
    """Raises: RequestError when a size is asked for; with none it returns the input embedding, as transformers."""
    if new_num_tokens is None:
        return model.get_input_embeddings()
    raise RequestError(
        f"resize_token_embeddings({new_num_tokens}) on an attached model would replace adapted layers; "
        "detach, resize, and attach again"
    )


def tie_weights(model: nn.Module, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
    """Does nothing: what is tied is so already, and transformers would put base weights where trained ones are."""


GUARDS: dict[str, Callable[..., Any]] = {
    "save_pretrained": save_pretrained,
    "push_to_hub": push_to_hub,
    "resize_token_embeddings": resize_token_embeddings,
    "tie_weights": tie_weights,
}


@final
class Guard:
    """A function of GUARDS, bound to a model that it does not keep alive."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self._name, self._model = name, weakref.ref(model)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The guard's function of the model. Raises: ReferenceError when the model is gone."""
        model = self._model()
        if model is None:
            raise ReferenceError(f"{self._name} of a model that is no more")
        return GUARDS[self._name](model, *arguments, **named)

    def __reduce__(self) -> tuple[type[Guard], tuple[str, nn.Module | None]]:
        return Guard, (self._name, self._model())


HAS_ADAPTER = "_hf_peft_config_loaded"
"""transformers' own mark on a model that has an adapter inside, whoever put it there: Trainer refuses to train a model
in 8 or 4 bits without it."""


def guard_methods(model: nn.Module) -> None:
    """Puts the guards in front of the methods of a transformers model, and the mark on one in 8 or 4 bits."""
    if isinstance(model, PreTrainedModel):
        vars(model).update({name: Guard(name, model) for name in GUARDS})
        if vars(model).get("is_quantized", False):
            vars(model)[HAS_ADAPTER] = True


def unguard_methods(model: nn.Module) -> None:
    """Takes them away again."""
    for name in (*GUARDS, HAS_ADAPTER):
        vars(model).pop(name, None)
