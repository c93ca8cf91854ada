"""How ranks are chosen and moved: the `ranks:` section of a run file.

`fixed`     each layer keeps the rank that `adapter:` gives it.
`layered`   ranks by kind of layer, by depth, by a budget; before training, without data.
`spectrum`  ranks under a budget from the spectrum of gradients, activations or both; before training, from data.
`grow`      ranks start low and grow while training.
`adaptive`  ranks are pruned and grown under a fixed budget while training.
`nested`    one run whose every prefix of the rank works, so that the result can be cut to any rank.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from rankwise.errors import RequestError, did_you_mean

FIELDS: dict[str, tuple[str, ...]] = {
    "fixed": (),
    "layered": ("plan", "depth", "budget", "min", "max", "alpha"),
    "spectrum": ("budget", "measure", "batches", "min", "max", "alpha", "plan"),
    "grow": ("start", "max", "every", "by", "where", "measure", "budget", "settle", "alpha"),
    "adaptive": ("budget", "start", "min", "max", "every", "settle"),
    "nested": ("min",),
}
"""The policies, and what each reads of the section."""

PLANNED = ("layered", "spectrum")
"""Policies that give layers their ranks before training."""
NEEDED: dict[str, tuple[str, ...]] = {"spectrum": ("budget",), "adaptive": ("budget",), "grow": ("max", "every")}
"""Settings without which a policy means nothing."""

RESIZING = ("grow", "adaptive")
"""Policies that replace parameters while training, and the optimizer's state with them."""
MOVING = (*RESIZING, "nested")
"""Policies by which layers have other ranks from step to step."""

DEPTHS = ("up", "down", "hump")
MEASURES: dict[str, tuple[str, ...]] = {
    "spectrum": ("gradient", "activation", "product"),
    "grow": ("effective-rank", "gradient"),
}
"""What `measure` can be; the first is the default."""
ALPHAS = ("keep", "scale")

DEFAULT_BATCHES = 2
DEFAULT_BY = 4
DEFAULT_SETTLE = 0.2
DEFAULT_EVERY = 50
"""Steps between changes under `adaptive`."""
SATURATED = "saturated"
ALL = "all"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_AMOUNT = re.compile(r"(?P<number>\d[\d_]*(?:\.\d+)?(?:e\+?\d+)?)\s*(?P<unit>[a-z]*)", re.IGNORECASE)
_EVERY = re.compile(r"\d+|(?:\d+(?:\.\d+)?|\.\d+)\s*epochs?")
_TOP = re.compile(r"top-(\d+)")


@dataclass(frozen=True)
class Budget:
    """The most trainable parameters, or, with `in_bytes`, the largest weights file of the adapter."""

    amount: int
    in_bytes: bool

    @classmethod
    def parse(cls, value: int | str) -> Budget:
        """`400000`, `"4e5"` (parameters); `"4MB"`, `"3.5 MiB"` (bytes of the file). Raises: RequestError."""
        match = _AMOUNT.fullmatch(str(value).strip())
        if match is None or match["unit"].upper() not in _UNITS or isinstance(value, bool):
            raise RequestError(
                f'ranks.budget must be a number of trainable parameters, or bytes such as "4MB", not {value!r}'
            )
        amount = math.floor(float(match["number"].replace("_", "")) * _UNITS[match["unit"].upper()])
        if amount < 1:
            raise RequestError(f"ranks.budget must be above 0, not {value!r}")
        return cls(amount, bool(match["unit"]))

    def __str__(self) -> str:
        return f"{self.amount:,} {'bytes' if self.in_bytes else 'parameters'}"


@dataclass(frozen=True)
class RanksConfig:
    """Which policy, and its settings. None means: not given. What the policy does not read must not be given.

    Args:
        policy: see the module's head.
        plan: the end of a layer's name, or an expression for it, to rank; 0 leaves the layer out. The first that fits
            decides; layers that none fits keep `adapter.r`. With a budget, ranks are proportions. Under `spectrum` it
            is what was measured: written into the run's own run file, then not measured again.
        depth: ranks by the layer's place between first and last block: `up`, `down`, or `hump` (highest in the middle).
        budget: trainable parameters, or bytes of the weights file ("4MB"): met to within one rank, never exceeded.
        min, max: bounds of a layer's rank.
        start: the rank that layers begin with; not given: `adapter.r`.
        every: steps, or "5 epochs", between changes.
        by: how many ranks a layer grows at once.
        where: which layers grow: `saturated`, `all`, or `top-8`.
        measure: what speaks for a rank: of `spectrum` gradient, activation or product; of `grow` effective-rank or
            gradient.
        batches: steps' worth of rows that are looked at before training.
        settle: share of the steps, at the end, in which ranks stay.
        alpha: `keep` (scales are lora_alpha over the layer's own rank) or `scale` (alpha goes with the rank, so every
            layer has the scale lora_alpha / r).

    Raises: RequestError for a value out of range, or a setting that the policy does not read.
    """

    policy: str = "fixed"
    plan: dict[str, int] | None = None
    depth: str | None = None
    budget: int | str | None = None
    min: int | None = None
    max: int | None = None
    start: int | None = None
    every: int | str | None = None
    by: int | None = None
    where: str | None = None
    measure: str | None = None
    batches: int | None = None
    settle: float | None = None
    alpha: str | None = None

    def __post_init__(self) -> None:
        if self.policy not in FIELDS:
            raise RequestError(f"ranks.policy can't be '{self.policy}'{did_you_mean(self.policy, FIELDS)}")
        self._check_read()
        self._check_values()
        if self.policy == "layered":
            self._check_layered()

    @property
    def most_parameters(self) -> Budget | None:
        """`budget`, understood."""
        return None if self.budget is None else Budget.parse(self.budget)

    @property
    def measured(self) -> str:
        """`measure`, or the policy's own."""
        return self.measure or MEASURES[self.policy][0]

    @property
    def top(self) -> int | None:
        """The number in `where: top-8`."""
        match = _TOP.fullmatch(self.where or "")
        return int(match[1]) if match else None

    def _check_read(self) -> None:
        read = FIELDS[self.policy]
        for item in fields(self):
            if item.name not in ("policy", *read) and getattr(self, item.name) is not None:
                what = f"which reads {', '.join(read)}" if read else "which reads no other setting"
                raise RequestError(
                    f"ranks.{item.name} has no effect with ranks.policy: {self.policy}, {what}; leave it out"
                )
        for name in NEEDED.get(self.policy, ()):
            if getattr(self, name) is None:
                raise RequestError(f"missing setting 'ranks.{name}', which ranks.policy: {self.policy} needs")

    def _check_values(self) -> None:
        for name in ("min", "max", "start", "by", "batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"ranks.{name} must be at least 1, not {value!r}")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise RequestError(f"ranks.min ({self.min}) is above ranks.max ({self.max}); swap them")
        if self.start is not None and self.max is not None and self.start > self.max:
            raise RequestError(f"ranks.start ({self.start}) is above ranks.max ({self.max}); lower it")
        if self.start is not None and self.min is not None and self.start < self.min:
            raise RequestError(f"ranks.start ({self.start}) is below ranks.min ({self.min}); raise it")
        for name, known in (("depth", DEPTHS), ("measure", MEASURES.get(self.policy, ())), ("alpha", ALPHAS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise RequestError(f"ranks.{name} can't be '{value}'{did_you_mean(value, known)}")
        if self.budget is not None:
            Budget.parse(self.budget)
        if self.settle is not None and not 0 <= self.settle < 1:
            raise RequestError(f"ranks.settle must be at least 0 and below 1, not {self.settle!r}")
        if self.where is not None and self.where not in (SATURATED, ALL) and not self.top:
            raise RequestError(f"ranks.where must be saturated, all, or top-N such as top-8, not {self.where!r}")
        every = None if self.every is None else str(self.every).strip()
        if every is not None and (not _EVERY.fullmatch(every) or float(every.split("e")[0]) == 0):
            raise RequestError(f'ranks.every must be a number of steps or "5 epochs", not {self.every!r}')
        self._check_plan()

    def _check_plan(self) -> None:
        if self.plan is None:
            return
        for pattern, rank in self.plan.items():
            if type(rank) is not int or rank < 0:
                raise RequestError(
                    f"ranks.plan['{pattern}'] must be a whole number, 0 to leave the layer out, not {rank!r}"
                )
            try:
                re.compile(pattern)
            except re.error as error:
                raise RequestError(f"ranks.plan {pattern!r} is not a regular expression: {error}") from None
        if not any(self.plan.values()):
            raise RequestError("ranks.plan gives no layer a rank; give it one above 0, or leave the plan out")

    def _check_layered(self) -> None:
        if self.plan is None and self.depth is None and self.budget is None:
            raise RequestError("ranks.policy: layered needs ranks.plan, ranks.depth or ranks.budget; give one of them")
        if self.plan is not None and self.depth is not None:
            raise RequestError("ranks.depth has no effect beside ranks.plan, which says all ranks; leave one out")
        bounded = self.depth is not None or self.budget is not None
        for name in ("min", "max"):
            if getattr(self, name) is not None and not bounded:
                raise RequestError(f"ranks.{name} has no effect on a ranks.plan without ranks.budget; leave it out")
