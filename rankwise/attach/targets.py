"""Which modules get which adapter: names, regular expressions, `all-linear`, exclusion, layer numbers, patterns.

The rules are PEFT's (peft 0.21, `check_target_module_exists` and `get_pattern_key`), so that a folder means the same in
both; unlike there, whatever matches nothing is an error that names what is near.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.config import ALL_LINEAR, LoraConfig
from rankwise.adapters.layers import LAYER_KINDS, LayerKind, layer_kind
from rankwise.attach.uncalled import why_uncalled
from rankwise.errors import RequestError, did_you_mean
from rankwise.quantized import foreign_storage, num_weights

CLASSIFIER_HEADS = ("classifier", "score")
"""Heads that PEFT trains with task types SEQ_CLS and TOKEN_CLS."""
HEADS = {"SEQ_CLS": CLASSIFIER_HEADS, "TOKEN_CLS": CLASSIFIER_HEADS, "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class Target:
    """One module to adapt, with its own rank and alpha."""

    name: str
    module: nn.Module
    kind: LayerKind
    r: int
    lora_alpha: int | float


def find_targets(model: nn.Module, config: LoraConfig, strict: bool = True) -> list[Target]:
    """The modules that `config` adapts, in the model's order.

    Without `strict`, parts of the configuration may match nothing: a folder's weights say what it must hold, and PEFT
    lets a list of names that serves several kinds of models stand.

    Raises: RequestError when a target, an exclusion or a pattern matches nothing, or a match can't be adapted.
    """
    modules = dict(model.named_modules())
    names = [name for name in modules if name]
    _check_expressions(config)
    if strict and not is_all_linear(config):
        refuse_unmatched("target_modules", config.target_modules, names)
    if strict:
        refuse_unmatched("exclude_modules", config.exclude_modules or [], names)
    linear = _all_linear(model, config, modules) if is_all_linear(config) else None
    matched = [name for name in names if _matches(config, name, linear)]
    if not matched:
        _check_numbers(config, names, matched)
        adaptable = sorted({name.rsplit(".", 1)[-1] for name in names if layer_kind(modules[name]) is not None})
        raise RequestError(
            f"target_modules={config.target_modules!r} with its exclusions and layer numbers selects no layer"
            + did_you_mean(str(config.target_modules), adaptable)
        )
    targets = [_target(config, name, modules[name]) for name in matched]
    _check_usable(model, modules, targets)
    if strict:
        _check_called(modules, matched)
        _check_numbers(config, names, matched)
        _check_patterns(config, matched)
    return targets


def fits(given: str | Collection[str], name: str) -> bool:
    """PEFT's rule: an expression fits a whole name, an entry of a list a whole name or its last parts."""
    if isinstance(given, str):
        return re.fullmatch(given, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in given)


def refuse_unmatched(option: str, given: str | Iterable[str], names: Iterable[str]) -> None:
    """Raises: RequestError when an expression, or an entry of a list, fits none of the modules' names."""
    if isinstance(given, str):
        if not any(fits(given, name) for name in names):
            raise RequestError(f"{option} expression {given!r} matches no module in full{did_you_mean(given, names)}")
        return
    for entry in given:
        if not any(fits([entry], name) for name in names):
            raise RequestError(f"{option} names '{entry}', which matches no module{did_you_mean(entry, _tails(names))}")


def is_all_linear(config: LoraConfig) -> bool:
    """Whether the targets are every linear layer that is called, but the output head."""
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def modules_to_save(model: nn.Module, config: LoraConfig, strict: bool = True) -> list[str]:
    """Names of the modules that are trained whole: `modules_to_save` and the heads of the task type.

    PEFT matches by the end of the name, with no regard to dots, and so do we: a folder must hold what it expects.

    Raises: RequestError when an entry that the user named matches nothing (with `strict`).
    """
    names = [name for name, _ in model.named_modules() if name]
    chosen: list[str] = []
    for entry in config.modules_to_save or ():
        found = [name for name in names if name.endswith(entry)]
        if strict and not found and entry not in HEADS.get(config.task_type or "", ()):
            raise RequestError(f"modules_to_save names '{entry}', which matches no module{did_you_mean(entry, names)}")
        chosen += found
    unique = list(dict.fromkeys(chosen))
    return [name for name in unique if not any(name.startswith(f"{other}.") for other in unique)]


def with_task_heads(config: LoraConfig) -> LoraConfig:
    """`config` whose `modules_to_save` includes the heads of its task type, as PEFT's model classes do."""
    heads = HEADS.get(config.task_type or "", ())
    missing = [head for head in heads if head not in (config.modules_to_save or ())]
    return config.with_(modules_to_save=[*(config.modules_to_save or ()), *missing]) if missing else config


def shortest_names(targets: Iterable[str], model: nn.Module) -> list[str]:
    """The last parts of the targets' names where those select the same layers and no others, else the full names."""
    wanted = set(targets)
    tails = sorted({name.rsplit(".", 1)[-1] for name in wanted})
    selected = {name for name, _ in model.named_modules() if fits(tails, name)}
    return tails if selected == wanted else sorted(wanted)


def weight_share_left_out(model: nn.Module, targets: list[Target]) -> tuple[float, list[str]]:
    """Share (0 to 1) of the weights inside the model's layers that no target covers, and the largest names among them.

    Counts parameters of two and more dimensions; embeddings and output head are not layers.
    """
    covered = {id(parameter) for target in targets for parameter in target.module.parameters()}
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)] + embedding_ends(model)
    ends = {id(parameter) for module in embeddings for parameter in module.parameters()}
    whole, left = 0, {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or id(parameter) in ends:
            continue
        whole += num_weights(parameter)
        if id(parameter) not in covered:
            short = re.sub(r"\.\d+\.", ".*.", name)
            left[short] = left.get(short, 0) + num_weights(parameter)
    largest = sorted(left, key=lambda name: -left[name])[:4]
    return (sum(left.values()) / whole if whole else 0.0), largest


def embedding_ends(model: nn.Module) -> list[nn.Module]:
    """Input embedding and output head of a transformers model; what it does not have is left out."""
    if not isinstance(model, PreTrainedModel):
        return []
    ends = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            ends.append(get())
        except NotImplementedError:  # a model without tokens
            continue
    return [end for end in ends if end is not None]


def _all_linear(model: nn.Module, config: LoraConfig, modules: dict[str, nn.Module]) -> set[str]:
    left_out = embedding_ends(model)[1:]
    if isinstance(model, PreTrainedModel) and not left_out and config.task_type == "SEQ_CLS":
        left_out = [modules[name] for name in CLASSIFIER_HEADS if name in modules]
    linear = {name: module for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))}
    called = {name: module for name, module in linear.items() if name and why_uncalled(name, modules) is None}
    return {name for name, module in called.items() if not any(module is head for head in left_out)}


def _matches(config: LoraConfig, name: str, linear: Collection[str] | None = None) -> bool:
    """Whether layer `name` is a target; `linear` are the names that `all-linear` means."""
    if config.exclude_modules and fits(config.exclude_modules, name):
        return False
    if any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in config.modules_to_save or ()):
        return False  # PEFT's pattern: it is, or lies inside, a module that is trained whole
    if linear is not None:
        return name in linear
    if not fits(config.target_modules, name):
        return False
    if isinstance(config.target_modules, str) or name in config.target_modules:
        return True  # as in PEFT, a full name is not subject to layers_to_transform
    return config.layers_to_transform is None or _layer_number(config, name) in _numbers(config)


def _numbers(config: LoraConfig) -> list[int]:
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else list(layers or ())


def _layer_number(config: LoraConfig, name: str) -> int | None:
    """The first number between dots (`layers.3.`), or the one after a name in `layers_pattern`."""
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]
    found = [re.match(expression, name) for expression in expressions or [r".*?\.[^.]*\.(?P<idx>\d+)\."]]
    return next((int(match["idx"]) for match in found if match), None)


def _check_numbers(config: LoraConfig, names: list[str], matched: list[str]) -> None:
    unknown = set(_numbers(config)) - {_layer_number(config, name) for name in matched}
    if unknown:
        anywhere = config.with_(layers_to_transform=None, layers_pattern=None)
        having = {_layer_number(config, name) for name in names if _matches(anywhere, name)}
        known = sorted(number for number in having if number is not None)
        raise RequestError(
            f"layers_to_transform names layer {min(unknown)}, which has no target"
            + (f" under layers_pattern={config.layers_pattern!r}" if config.layers_pattern else "")
            + f"; layers with one: {', '.join(map(str, known)) or 'none'}"
        )


def _check_called(modules: dict[str, nn.Module], matched: list[str]) -> None:
    for name in matched:
        if (reason := why_uncalled(name, modules)) is not None:
            raise RequestError(
                f"'{name}' can't be adapted: {reason}, and an adapter there would do nothing; exclude it"
            )


def _check_patterns(config: LoraConfig, matched: list[str]) -> None:
    for option, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(pattern_fits(pattern, name) for name in matched):
                near = did_you_mean(pattern, _tails(matched))
                raise RequestError(f"{option}['{pattern}'] matches no adapted layer{near}")


def _check_expressions(config: LoraConfig) -> None:
    names_or_one = ("target_modules", "exclude_modules")  # a list holds names, a string is an expression
    options = [option for option in names_or_one if isinstance(getattr(config, option), str)]
    for option in [*options, "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save"]:
        given = getattr(config, option) or ()
        for expression in [given] if isinstance(given, str) else given:
            try:
                re.compile(expression)
            except re.error as error:
                raise RequestError(f"{option} {expression!r} is not a regular expression: {error}") from None


def _tails(names: Iterable[str]) -> list[str]:
    """`a.b.c` as `c`, `b.c`: what a target can say; parts with numbers are left out."""
    ends = [name.split(".")[-length:] for name in names for length in (1, 2)]
    return sorted({".".join(end) for end in ends if not end[0].isdigit()})


def _check_usable(model: nn.Module, modules: dict[str, nn.Module], targets: list[Target]) -> None:
    """Layers that can't be merged, or that the model reads but never calls: an adapter there would do nothing."""
    for target in targets:
        if isinstance(target.module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and target.module.groups > 1:
            raise RequestError(
                f"'{target.name}' is a grouped convolution (groups={target.module.groups}), whose low-rank change "
                "can't be merged; exclude it"
            )
        if isinstance(target.module, nn.Embedding) and target.module.max_norm is not None:
            raise RequestError(
                f"'{target.name}' is an embedding with max_norm={target.module.max_norm:g}, which writes into its own "
                "weight whenever it is called, and would cut a merged one again; exclude it"
            )
        if isinstance(target.module, NonDynamicallyQuantizableLinear):
            raise RequestError(
                f"'{target.name}' is the output projection inside nn.MultiheadAttention, which reads its weight and "
                "never calls it: an adapter there would do nothing; exclude it"
            )
        parent = modules[target.name.rpartition(".")[0]]
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise RequestError(
                f"'{target.name}' is inside nn.TransformerEncoderLayer, whose fast path reads its weight without "
                "calling it; call torch.backends.mha.set_fastpath_enabled(False) first"
            )
    if not isinstance(model, PreTrainedModel) or not model.config.is_encoder_decoder:
        return
    shared = model.get_input_embeddings()  # T5's `shared`: encoder and decoder call their own embeddings of its weight
    embeddings = {name: module for name, module in modules.items() if isinstance(module, nn.Embedding)}
    called = [name for name, own in embeddings.items() if own is not shared and own.weight is shared.weight]
    for target in targets:
        if target.module is shared and called:
            raise RequestError(
                f"'{target.name}' is never called, an adapter there would do nothing; target {called} instead"
            )


def pattern_fits(pattern: str, name: str) -> bool:
    """PEFT's rule for patterns of ranks: the expression fits a whole name, or its last parts."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _target(config: LoraConfig, name: str, module: nn.Module) -> Target:
    kind = layer_kind(module)
    if kind is None:
        supported = ", ".join(cls.__name__ for cls in LAYER_KINDS)
        raise RequestError(f"'{name}' is a {type(module).__name__}, which can't be adapted; target one of {supported}")
    if (storage := foreign_storage(module)) is not None:
        raise RequestError(
            f"'{name}' ({type(module).__name__}) is stored as {storage}, which can't be adapted; "
            "exclude it, or load the model unquantised or through bitsandbytes (Linear8bitLt, Linear4bit)"
        )
    return Target(name, module, kind, rank_in(config, name), alpha_in(config, name))


def rank_in(config: LoraConfig, name: str) -> int:
    """The rank of layer `name` under `config`: the first pattern that fits the end of its name decides, as in PEFT."""
    return next((r for pattern, r in config.rank_pattern.items() if pattern_fits(pattern, name)), config.r)


def alpha_in(config: LoraConfig, name: str) -> int | float:
    """The alpha of layer `name` under `config`, by the same rule."""
    alphas = (alpha for pattern, alpha in config.alpha_pattern.items() if pattern_fits(pattern, name))
    return next(alphas, config.lora_alpha)
