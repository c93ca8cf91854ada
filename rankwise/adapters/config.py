"""The `adapter:` section of a run file, with PEFT's field names (peft.LoraConfig 0.21)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from rankwise.config import check_types
from rankwise.errors import RequestError, did_you_mean

ALL_LINEAR = "all-linear"
STARTS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora")
"""Names that `init_lora_weights` takes besides true (kaiming), false (random B), `pissa_niter_N` and DATA_STARTS."""
DATA_STARTS = ("eva", "lora_ga")
"""Starts from what data say about a layer: a run measures it, see `rankwise.ranks.spectrum`."""
BIASES = ("none", "all", "lora_only")
TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation, W + s B A (Hu et al. 2021, arXiv 2106.09685, section 4.1).

    s is `lora_alpha / r`, with `use_rslora` `lora_alpha / sqrt(r)` (Kalajdzievski 2023, arXiv 2312.03732). Every field
    but `kind` and `init_scale` is PEFT's, with PEFT's meaning. `target_modules` defaults to every linear layer but
    the output head: query and value projections alone are the weakest choice.

    `init_scale` multiplies the variance of A at the start. `use_dora` splits magnitude from direction (Liu et al. 2024,
    arXiv 2402.09353).
    """

    kind: str = "lora"
    r: int = 16
    lora_alpha: int | float = 32
    target_modules: str | list[str] = ALL_LINEAR
    exclude_modules: str | list[str] | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    init_scale: float = 1.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        self._normalise()
        check_types(self, beside=("r", "lora_alpha"))  # which say below what they must be
        for name, value, known in (
            ("kind", self.kind, ("lora",)),
            ("bias", self.bias, BIASES),
            ("task_type", self.task_type or TASK_TYPES[0], TASK_TYPES),
        ):
            if value not in known:
                raise RequestError(f"unknown {name} {value!r}{did_you_mean(str(value), known)}")
        ranks = {"r": self.r} | {f"rank_pattern['{pattern}']": rank for pattern, rank in self.rank_pattern.items()}
        for name, rank in ranks.items():
            if type(rank) is not int or rank <= 0:  # True is no rank
                raise RequestError(
                    f"{name} must be a positive whole number, not {rank!r}; to leave a layer out, exclude it"
                )
        alphas = {f"alpha_pattern['{pattern}']": alpha for pattern, alpha in self.alpha_pattern.items()}
        for name, alpha in {"lora_alpha": self.lora_alpha, **alphas}.items():
            if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
                raise RequestError(f"{name} must be above 0, not {alpha!r}: at 0 the adapter can never change anything")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise RequestError(f"lora_dropout must be at least 0 and below 1, not {self.lora_dropout!r}")
        if not self.init_scale > 0.0:
            raise RequestError(f"init_scale must be above 0, not {self.init_scale!r}; 1 leaves the start as it is")
        if not self.target_modules:
            raise RequestError("target_modules is empty; name layers, give a regular expression, or 'all-linear'")
        if self.layers_pattern and self.layers_to_transform is None:
            raise RequestError("layers_pattern has no effect without layers_to_transform; set it or drop the pattern")
        if self.layers_to_transform == []:
            raise RequestError("layers_to_transform is empty; name layer numbers, or leave it out to adapt every layer")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise RequestError(
                f"layers_to_transform has no effect with target_modules={self.target_modules!r}; list the layers' "
                "names, or put the numbers into the expression"
            )
        start = start_name(self.init_lora_weights)
        if self.init_scale != 1.0 and start in {"pissa", "olora", *DATA_STARTS}:
            whose = "the data's" if start in DATA_STARTS else "the base's own"
            raise RequestError(f"init_scale has no effect with init_lora_weights={start!r}, whose A is {whose}")

    def _normalise(self) -> None:
        """Sets and tuples, usual in code written for PEFT, become lists.

        Raises: RequestError for text where a list is meant.
        """
        lists = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        for name in (*lists, "trainable_token_indices"):
            value = getattr(self, name)
            if type(value) in (set, frozenset, tuple):
                items = cast("Iterable[str]", value)
                object.__setattr__(self, name, list(items) if type(value) is tuple else sorted(items))
        if isinstance(self.modules_to_save, str):
            raise RequestError(f"modules_to_save must be a list of names, not {self.modules_to_save!r}")

    def with_(self, **changes: Any) -> LoraConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)


def start_name(init_lora_weights: bool | str) -> str:
    """The start that `init_lora_weights` means: `kaiming`, `random`, or a name; `pissa` for `pissa_niter_N`.

    Raises: RequestError for a name that is not known.
    """
    if isinstance(init_lora_weights, bool):
        return "kaiming" if init_lora_weights else "random"
    name, _, iterations = init_lora_weights.lower().partition("_niter_")
    if name == "pissa" and iterations and not (iterations.isdigit() and int(iterations) > 0):
        raise RequestError(f"init_lora_weights={init_lora_weights!r}: iterations must be a positive whole number")
    known = (*STARTS, *DATA_STARTS)
    if name not in known or (iterations and name != "pissa"):
        raise RequestError(f"unknown init_lora_weights {init_lora_weights!r}{did_you_mean(name, known)}")
    return name


def start_iterations(init_lora_weights: bool | str) -> int | None:
    """N of `pissa_niter_N`, else None (a full SVD)."""
    if isinstance(init_lora_weights, str) and "_niter_" in init_lora_weights:
        return int(init_lora_weights.rsplit("_", 1)[1])
    return None
