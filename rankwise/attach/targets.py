"""Which modules get which adapter: names, regular expressions, `all-linear`, exclusion, layer numbers, patterns.

The rules are PEFT's (peft 0.21, `check_target_module_exists` and `get_pattern_key`), so that a folder means the same in
both; unlike there, whatever matches nothing is an error that names what is near.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.config import ALL_LINEAR, LoraConfig
from rankwise.adapters.layers import LAYER_KINDS, LayerKind, layer_kind
from rankwise.errors import RequestError, did_you_mean

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
    if is_all_linear(config):
        matched = [name for name in _all_linear(model, config, modules) if not _excluded(config, name)]
    else:
        matched = [name for name in names if _matches(config, name)]
    if strict:
        _check_each_target(config, names)
        _check_exclusions(config, names)
    if not matched:
        raise RequestError(
            f"target_modules={config.target_modules!r} with its exclusions and layer numbers selects no layer"
            + did_you_mean(str(config.target_modules), _adaptable_tails(modules))
        )
    targets = [_target(config, name, modules[name]) for name in matched]
    _check_called(model, modules, targets)
    if strict:
        _check_numbers(config, names, matched)
        _check_patterns(config, matched)
    return targets


def is_all_linear(config: LoraConfig) -> bool:
    """Whether the targets are every linear layer but the output head."""
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
    selected = {
        name for name, _ in model.named_modules() if name in tails or any(name.endswith(f".{tail}") for tail in tails)
    }
    return tails if selected == wanted else sorted(wanted)


def weight_share_left_out(model: nn.Module, targets: list[Target]) -> tuple[float, list[str]]:
    """Share (0 to 1) of the weights inside the model's layers that no target covers, and the largest names among them.

    Counts parameters of two and more dimensions; embeddings and output head are not layers.
    """
    covered = {id(parameter) for target in targets for parameter in target.module.parameters()}
    ends = {id(parameter) for module in _embedding_modules(model) for parameter in module.parameters()}
    whole, left = 0, {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or id(parameter) in ends:
            continue
        whole += parameter.numel()
        if id(parameter) not in covered:
            short = re.sub(r"\.\d+\.", ".*.", name)
            left[short] = left.get(short, 0) + parameter.numel()
    largest = sorted(left, key=lambda name: -left[name])[:4]
    return (sum(left.values()) / whole if whole else 0.0), largest


def _embedding_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Embedding)] + embedding_ends(model)


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


def _all_linear(model: nn.Module, config: LoraConfig, modules: dict[str, nn.Module]) -> list[str]:
    left_out: set[nn.Module] = set()
    if isinstance(model, PreTrainedModel):
        heads = embedding_ends(model)[1:]
        if heads:
            left_out.update(heads)
        elif config.task_type == "SEQ_CLS":
            left_out |= {module for name, module in modules.items() if name in CLASSIFIER_HEADS}
    whole = config.modules_to_save or ()
    return [
        name
        for name, module in modules.items()
        if isinstance(module, (nn.Linear, Conv1D)) and module not in left_out and not _inside(name, whole)
    ]


def _matches(config: LoraConfig, name: str) -> bool:
    if _excluded(config, name) or _inside(name, config.modules_to_save or ()):
        return False
    if isinstance(config.target_modules, str):
        return re.fullmatch(config.target_modules, name) is not None
    if name in config.target_modules:
        return True  # as in PEFT, a full name is not subject to layers_to_transform
    if not any(name.endswith(f".{target}") for target in config.target_modules):
        return False
    return config.layers_to_transform in (None, []) or _layer_number(config, name) in _numbers(config)


def _numbers(config: LoraConfig) -> list[int]:
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else list(layers or ())


def _layer_number(config: LoraConfig, name: str) -> int | None:
    """The first number between dots (`layers.3.`), or the one after a name in `layers_pattern`."""
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
        return int(found["idx"]) if found else None
    for pattern in patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name)
        if found:
            return int(found["idx"])
    return None


def _excluded(config: LoraConfig, name: str) -> bool:
    if not config.exclude_modules:
        return False
    if isinstance(config.exclude_modules, str):
        return re.fullmatch(config.exclude_modules, name) is not None
    return name in config.exclude_modules or any(name.endswith(f".{entry}") for entry in config.exclude_modules)


def _inside(name: str, whole: Iterable[str]) -> bool:
    """Whether `name` is, or lies inside, a module that is trained whole (PEFT's pattern)."""
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in whole)


def _check_each_target(config: LoraConfig, names: list[str]) -> None:
    if isinstance(config.target_modules, str):
        if not is_all_linear(config) and not any(re.fullmatch(config.target_modules, name) for name in names):
            raise RequestError(
                f"target_modules expression {config.target_modules!r} matches no module in full"
                + did_you_mean(config.target_modules, names)
            )
        return
    for target in config.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({tail for name in names for tail in _tails(name)})
            raise RequestError(f"target module '{target}' matches no module{did_you_mean(target, known)}")


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


def _check_patterns(config: LoraConfig, matched: list[str]) -> None:
    for option, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(_pattern_fits(pattern, name) for name in matched):
                tails = sorted({tail for name in matched for tail in _tails(name)})
                raise RequestError(f"{option}['{pattern}'] matches no adapted layer{did_you_mean(pattern, tails)}")


def _check_exclusions(config: LoraConfig, names: list[str]) -> None:
    if not config.exclude_modules:
        return
    if isinstance(config.exclude_modules, str):
        if not any(re.fullmatch(config.exclude_modules, name) for name in names):
            raise RequestError(f"exclude_modules expression {config.exclude_modules!r} matches no module in full")
        return
    for entry in config.exclude_modules:
        if not any(name == entry or name.endswith(f".{entry}") for name in names):
            known = sorted({tail for name in names for tail in _tails(name)})
            raise RequestError(f"exclude_modules names '{entry}', which matches no module{did_you_mean(entry, known)}")


def _check_expressions(config: LoraConfig) -> None:
    layers_pattern = config.layers_pattern or []
    expressions = {
        "target_modules": config.target_modules if isinstance(config.target_modules, str) else [],
        "exclude_modules": config.exclude_modules if isinstance(config.exclude_modules, str) else [],
        "layers_pattern": layers_pattern,
        "rank_pattern": list(config.rank_pattern),
        "alpha_pattern": list(config.alpha_pattern),
        "modules_to_save": config.modules_to_save or [],
    }
    for option, given in expressions.items():
        for expression in [given] if isinstance(given, str) else given:
            try:
                re.compile(expression)
            except re.error as error:
                raise RequestError(f"{option} {expression!r} is not a regular expression: {error}") from None


def _tails(name: str) -> list[str]:
    """`a.b.c` as `c`, `b.c`: what a target can say; parts with numbers are left out."""
    parts = name.split(".")
    return [".".join(parts[-length:]) for length in (1, 2) if length <= len(parts) and not parts[-length].isdigit()]


def _adaptable_tails(modules: dict[str, nn.Module]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name, module in modules.items() if layer_kind(module) is not None})


def _check_called(model: nn.Module, modules: dict[str, nn.Module], targets: list[Target]) -> None:
    """Layers that the model reads but never calls: an adapter there would do nothing."""
    for target in targets:
        parent = modules[target.name.rpartition(".")[0]]
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise RequestError(
                f"'{target.name}' is inside nn.TransformerEncoderLayer, whose fast path reads its weight without "
                "calling it; call torch.backends.mha.set_fastpath_enabled(False) first"
            )
    if not isinstance(model, PreTrainedModel) or not model.config.is_encoder_decoder:
        return
    shared = model.get_input_embeddings()  # T5's `shared`: encoder and decoder call their own embeddings of its weight
    called = [name for name, module in modules.items() if module is not shared and _holds(module, shared.weight)]
    for target in targets:
        if target.module is shared and called:
            raise RequestError(
                f"'{target.name}' is never called, an adapter there would do nothing; target {called} instead"
            )


def _holds(module: nn.Module, weight: object) -> bool:
    return isinstance(module, nn.Embedding) and module.weight is weight


def _pattern_fits(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _from_pattern(patterns: dict[str, int] | dict[str, int | float], name: str, default: int | float) -> int | float:
    """The first pattern that fits the end of `name` decides, as in PEFT."""
    for pattern, value in patterns.items():
        if _pattern_fits(pattern, name):
            return value
    return default


def _target(config: LoraConfig, name: str, module: nn.Module) -> Target:
    kind = layer_kind(module)
    if kind is None:
        supported = ", ".join(cls.__name__ for cls in LAYER_KINDS)
        raise RequestError(f"'{name}' is a {type(module).__name__}, which can't be adapted; target one of {supported}")
    kind.check(module, name)
    return Target(name, module, kind, rank_in(config, name), alpha_in(config, name))


def rank_in(config: LoraConfig, name: str) -> int:
    """The rank of layer `name` under `config`."""
    return int(_from_pattern(config.rank_pattern, name, config.r))


def alpha_in(config: LoraConfig, name: str) -> int | float:
    """The alpha of layer `name` under `config`."""
    return _from_pattern(config.alpha_pattern, name, config.lora_alpha)
