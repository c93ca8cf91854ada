"""Methods of a transformers model that would do harm to an attached one, and what stands in for them.

They are functions with the model as their first argument, bound with `partial`, so that copies and pickles of an
attached model have their own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.errors import RequestError


def save_pretrained(
    model: nn.Module,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,  # Trainer passes the model's own
    push_to_hub: bool = False,
    max_shard_size: Any = None,  # adapters are one file
    safe_serialization: bool = True,
) -> None:
    """Writes the adapter folder. Takes what transformers' Trainer passes; refuses what would need the whole model."""
    from rankwise.attach.checkpoint import save_adapter

    if push_to_hub:
        raise RequestError("push_to_hub=True: call push_to_hub(repo_id) of the attached model instead")
    if not safe_serialization:
        raise RequestError("safe_serialization=False would write a pickle file; adapters are saved as safetensors only")
    if is_main_process:
        save_adapter(model, str(save_directory))


def push_to_hub(
    model: nn.Module, repo_id: str, commit_message: str = "Upload LoRA adapter", private: bool | None = None,
    token: str | bool | None = None, revision: str | None = None,
) -> str:  # fmt: skip
    """Creates the repository if need be and uploads the adapter folder; returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        done = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision)
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


HAS_ADAPTER = "_hf_peft_config_loaded"
"""transformers' own mark on a model that has an adapter inside, whoever put it there: Trainer refuses to train a model
in 8 or 4 bits without it."""


def guard_methods(model: nn.Module) -> None:
    """Puts the guards in front of the methods of a transformers model, and the mark on one in 8 or 4 bits."""
    if isinstance(model, PreTrainedModel):
        vars(model).update({name: partial(function, model) for name, function in GUARDS.items()})
        if vars(model).get("is_quantized", False):
            vars(model)[HAS_ADAPTER] = True


def unguard_methods(model: nn.Module) -> None:
    """Takes them away again."""
    for name in (*GUARDS, HAS_ADAPTER):
        vars(model).pop(name, None)
