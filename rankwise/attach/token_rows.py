"""Trainable token rows put together from a configuration, and what can't be trained whole, or twice."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.config import LoraConfig
from rankwise.adapters.tokens import TokenRows
from rankwise.attach.targets import embedding_ends, fits, refuse_unmatched
from rankwise.errors import RequestError
from rankwise.quantized import storage_of


def token_rows(model: nn.Module, config: LoraConfig, layers: Mapping[str, AdapterLayer]) -> dict[str, TokenRows]:
    """Layers for `trainable_token_indices`: a list means the input embedding; a tied head follows it.

    `layers`: the adapter layers that are there already. Raises: RequestError for what is no embedding, or one of these.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    modules = dict(model.named_modules())
    first = next(iter(embedding_ends(model)), None)
    if isinstance(wanted, list):
        if first is None:
            raise RequestError(
                "trainable_token_indices as a list needs a model with an input embedding, which "
                f"{type(model).__name__} does not say it has; name the embedding instead"
            )
        wanted = {next(name for name, module in modules.items() if module is first): wanted}
    refuse_unmatched("trainable_token_indices", wanted, modules)
    refuse_quantized(model, [name for name in modules if fits(list(wanted), name)], "trainable_token_indices")
    found: dict[str, TokenRows] = {}
    for name, indices in [(name, wanted[entry]) for entry in wanted for name in modules if fits([entry], name)]:
        if name in layers:
            raise RequestError(f"'{name}' is in target_modules and in trainable_token_indices; choose one")
        found[name] = TokenRows(modules[name], indices, name)
        if modules[name] is not first:
            continue  # as in PEFT, only the input embedding takes along what is tied to it
        for tied_name, tied in modules.items():
            if tied is first or tied._parameters.get("weight") is not found[name].weight:
                continue
            if tied_name in layers:
                raise RequestError(f"'{tied_name}' is tied to '{name}' with trainable rows and can't be a target too")
            found[tied_name] = TokenRows(tied, indices, tied_name, source=found[name])
    return found


def refuse_quantized(model: nn.Module, names: list[str], option: str) -> None:
    """Raises: RequestError for a module that `option` would train whole and that is stored in 8 or 4 bits."""
    for name in names:
        for inner, module in model.get_submodule(name).named_modules(prefix=name):
            if (storage := storage_of(module)) is not None:
                raise RequestError(
                    f"{option} names '{name}', whose weight '{inner}.weight' is stored in {storage} and can't be "
                    "trained; leave it out, load the model unquantised, or keep this part plain where you load it "
                    f"yourself (BitsAndBytesConfig: llm_int8_skip_modules=['{name}'])"
                )


def refuse_twice(whole: list[str], layers: Mapping[str, AdapterLayer]) -> None:
    """Raises: RequestError for an adapter layer inside of a module that is trained whole."""
    for module_name in whole:
        for name, layer in layers.items():
            if f"{name}.".startswith(f"{module_name}."):
                option = "trainable_token_indices" if isinstance(layer, TokenRows) else "target_modules"
                option += " (tied to the embedding)" if isinstance(layer, TokenRows) and layer.is_tied else ""
                raise RequestError(f"'{name}' is in modules_to_save and in {option}; choose one")
