"""How a run trains: the `train:` section of a run file.

A step is one optimizer update on `batch_size` data rows, taken `micro_batch_size` rows at a time. Rows come from an
endless stream of shuffled epochs, so steps may straddle two epochs; with `epochs` the last step is cut so that every
row is seen exactly that often.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rankwise.errors import RequestError, counted, did_you_mean
from rankwise.models.labels import POOLINGS
from rankwise.train.every import AUTO, Every
from rankwise.train.loggers import LOGGERS
from rankwise.train.needs import NEEDS, Needs

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adamw-fused", "adamw-8bit")
PRECISIONS = ("fp32", "bf16", "fp16", "auto")
SHARDINGS = ("none", "node", "full")

DEFAULT_STEPS = 200
DEFAULT_MICRO_BATCH_SIZE = 4
DEFAULT_SAMPLES = 3
DEFAULT_DPO_BETA = 0.1
DEFAULT_SAMPLE_TOKENS = 64
DEFAULT_CHECKPOINTS = 2
DEFAULT_STATE_SHARED_FROM = 50_000_000
"""Trainable parameters: Adam's two fp32 moments are then 400 MB, about what a block of a large base takes."""
DEFAULT_POOLING = "mean"
DEFAULT_TEMPERATURE = 0.05


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Args:
        objective: `sft` trains on answers, `text` on every token of a text.
        steps, epochs: how long; give one of them (neither: 200 steps).
        batch_size: data rows in one optimizer step.
        micro_batch_size: rows in one forward pass (memory, not results); not given: 4, but at most batch_size.
        lr: the highest learning rate.
        schedule: `constant`, `linear` or `cosine` decay after the warm-up.
        lr_floor: where the decay ends, as a fraction of `lr`.
        warmup: below 1 a fraction of the steps, else a number of steps, with a linearly growing rate.
        optimizer: `adamw`, `adamw-fused` (one kernel for all parameters) or `adamw-8bit` (a quarter of the state).
        loraplus_ratio: B of linear and convolutional layers learns at so many times `lr` (LoRA+).
        weight_decay: decoupled (AdamW); applies to matrices, not to biases and magnitudes.
        betas: Adam's decay rates.
        label_smoothing: the share of a label's probability that is spread over the vocabulary, in training.
        z_loss: the coefficient of log(Z)^2, which keeps the logits' normaliser Z near 1, in training.
        dpo_beta: how strongly `dpo` holds the model to its reference; not given: 0.1.
        max_grad_norm: gradients are scaled down to this norm; 0 or null: not.
        precision: of the frozen base: `fp32`, `bf16`, `fp16` (with a loss scale), or `auto` (bf16 where a probe shows
            that it is faster). Adapters and their optimizer state are always fp32.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        sharding: of the frozen base among several processes: `none` (each holds all of it), `full` (each holds its
            share of every block, and borrows the rest while it computes), or `node` (the processes of each machine hold
            one copy together). One process always holds all of it.
        share_optimizer_from: trainable parameters from which on each of several processes keeps its share of the
            optimizer's state only; null: never. Results are the same to the bit.
        fused_mlp: SwiGLU MLPs keep half as much for the backward pass; `auto`: where the model has some.
        seed: fixes the adapter's start, the order of rows and dropout.
        log_every, evaluate_every, save_every: steps, "2 epochs", null or 0 for never, `auto` for ten times in a run.
            The last step is always logged, evaluated and saved unless its setting says never (logging: always).
        keep_checkpoints: how many of the newest checkpoints stay: `auto` keeps 2, null all.
        keep_best: the checkpoint with the lowest validation loss stays besides, and the run's result is its adapter. An
            evaluation that finds a lower loss saves a checkpoint.
        early_stopping: the run ends when so many evaluations in turn brought no lower validation loss; null: never.
        early_stopping_min_delta: by how much lower it must be to count; not given: 0, any lower loss counts.
        samples: answers generated at each evaluation, into samples.jsonl; not given: 3 where there is an evaluation.
        sample_tokens: the most tokens of each such answer; not given: 64.
        statistics: norms of gradients and weights go with each line of metrics, by part of the adapter.
        loggers: where else the figures of metrics.jsonl go: `tensorboard`, `wandb`, `mlflow`, `trackio`.
        pooling: of `embedding`: how the vectors of a text's tokens become one: `mean`, `cls` (the first token's) or
            `last`; not given: mean. The result is scaled to length 1.
        temperature: of `embedding`: similarities (cosines) are divided by it; not given: 0.05.

    Raises: RequestError for a value out of range, or a setting without effect.
    """

    objective: str = "sft"
    steps: int | None = None
    epochs: int | float | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    lr: float = 2e-4
    schedule: str = "cosine"
    lr_floor: float = 0.0
    warmup: int | float = 0.05
    optimizer: str = "adamw"
    loraplus_ratio: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    dpo_beta: float | None = None
    max_grad_norm: float | None = 1.0
    precision: str = AUTO
    gradient_checkpointing: bool = False
    sharding: str = "none"
    share_optimizer_from: int | None = DEFAULT_STATE_SHARED_FROM
    fused_mlp: bool | str = AUTO
    seed: int = 0
    log_every: int | str | None = 1
    evaluate_every: int | str | None = AUTO
    save_every: int | str | None = AUTO
    keep_checkpoints: int | str | None = AUTO
    keep_best: bool = False
    early_stopping: int | None = None
    early_stopping_min_delta: float | None = None
    samples: int | None = None
    sample_tokens: int | None = None
    statistics: bool = False
    loggers: list[str] = field(default_factory=list)
    pooling: str | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", DEFAULT_STEPS)
        if self.micro_batch_size is None:
            object.__setattr__(self, "micro_batch_size", min(DEFAULT_MICRO_BATCH_SIZE, max(self.batch_size, 1)))
        self._check_names()
        self._check_length()
        self._check_rates()
        self._check_loss()
        self._check_events()
        self._check_embedding()

    def _check_names(self) -> None:
        named = {
            "objective": NEEDS, "schedule": SCHEDULES, "optimizer": OPTIMIZERS, "precision": PRECISIONS,
            "sharding": SHARDINGS,
        }  # fmt: skip
        for name, known in named.items():
            value = getattr(self, name)
            if value not in known:
                raise RequestError(f"train.{name} can't be '{value}'{did_you_mean(value, known)}")

        for name in self.loggers:
            if name not in LOGGERS:
                raise RequestError(f"train.loggers can't have '{name}'{did_you_mean(name, LOGGERS)}")
            if self.loggers.count(name) > 1:
                raise RequestError(f"train.loggers names {name} twice; once is enough")
        if isinstance(self.fused_mlp, str) and self.fused_mlp != AUTO:
            raise RequestError(f"train.fused_mlp must be true, false or auto, not {self.fused_mlp!r}")

    def _check_length(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise RequestError(
                f"train.steps ({self.steps}) and train.epochs ({self.epochs}) both say how long to train; "
                "set one of them to null"
            )
        _at_least("steps", self.steps, 1)
        if self.epochs is not None and not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise RequestError(f"train.epochs must be more than 0, not {self.epochs}")
        _at_least("batch_size", self.batch_size, 1)
        _at_least("micro_batch_size", self.micro_batch_size, 1)
        if self.micro_rows > self.batch_size:
            raise RequestError(
                f"train.micro_batch_size ({self.micro_rows}) is larger than train.batch_size ({self.batch_size}); "
                f"set it to {self.batch_size} or less"
            )

    def _check_rates(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise RequestError(f"train.lr must be more than 0, not {self.lr}; 2e-4 is a usual start for LoRA")
        if not 0 <= self.lr_floor <= 1:
            raise RequestError(f"train.lr_floor is a fraction of train.lr, from 0 to 1, not {self.lr_floor}")
        if self.lr_floor and self.schedule == "constant":
            raise RequestError("train.lr_floor has no effect with a constant schedule; use linear or cosine, or 0")
        if not (self.warmup >= 0 and math.isfinite(self.warmup)) or (self.warmup >= 1 and self.warmup % 1):
            raise RequestError(
                f"train.warmup must be a fraction of the steps below 1, or a whole number of steps, not {self.warmup}"
            )
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise RequestError(f"train.weight_decay must be 0 or more, not {self.weight_decay}")
        if not (self.loraplus_ratio > 0 and math.isfinite(self.loraplus_ratio)):
            raise RequestError(f"train.loraplus_ratio must be more than 0, not {self.loraplus_ratio}; 1 turns it off")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RequestError(f"train.betas must be at least 0 and below 1, not {list(self.betas)}")
        if self.max_grad_norm is not None and not self.max_grad_norm >= 0:
            raise RequestError(f"train.max_grad_norm must be above 0, or 0 for no clipping, not {self.max_grad_norm}")

    def _check_loss(self) -> None:
        if self.dpo_beta is not None:
            if self.objective != "dpo":
                raise RequestError(
                    f"train.dpo_beta ({self.dpo_beta:g}) has no effect with train.objective: {self.objective}; leave "
                    "it out, or use dpo"
                )
            if not (self.dpo_beta > 0 and math.isfinite(self.dpo_beta)):
                raise RequestError(f"train.dpo_beta must be more than 0, not {self.dpo_beta}; 0.1 is usual")
        if not 0 <= self.label_smoothing < 1:
            raise RequestError(f"train.label_smoothing must be at least 0 and below 1, not {self.label_smoothing}")
        if not (self.z_loss >= 0 and math.isfinite(self.z_loss)):
            raise RequestError(f"train.z_loss must be 0 or more, not {self.z_loss}; 1e-4 is usual")
        for name in ("label_smoothing", "z_loss"):
            value = getattr(self, name)
            if value and not self.needs.smooths:
                raise RequestError(
                    f"train.{name} ({value}) has no effect with train.objective: {self.objective}; set it to 0"
                )

    def _check_events(self) -> None:
        for name in ("log_every", "evaluate_every", "save_every"):
            Every.parse(getattr(self, name), f"train.{name}", DEFAULT_STEPS)
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"train.seed must be a whole number from 0 to 2**63 - 1, not {self.seed}")
        self._check_checkpoints()
        self._check_best()
        self._check_samples()
        _at_least("share_optimizer_from", self.share_optimizer_from, 1)

    def _check_checkpoints(self) -> None:
        keep = self.keep_checkpoints
        if isinstance(keep, str):
            if keep != AUTO:
                raise RequestError(f"train.keep_checkpoints must be a number, auto, or null for all, not {keep!r}")
            return
        _at_least("keep_checkpoints", keep, 1)
        if Every.parse(self.save_every, "train.save_every", DEFAULT_STEPS).is_never:
            raise RequestError(
                f"train.keep_checkpoints ({'null' if keep is None else keep}) has no effect: train.save_every says "
                "never; leave it out, or set save_every"
            )

    def _check_best(self) -> None:
        _at_least("early_stopping", self.early_stopping, 1)
        delta = self.early_stopping_min_delta
        if delta is not None and self.early_stopping is None:
            raise RequestError(
                f"train.early_stopping_min_delta ({delta:g}) has no effect without train.early_stopping; set that to a "
                "number of evaluations, or leave it out"
            )
        if delta is not None and not (delta >= 0 and math.isfinite(delta)):
            raise RequestError(f"train.early_stopping_min_delta must be 0 or more, not {delta}; 0.01 is usual")
        for name, value in self.needs_evaluation.items():
            if self.evaluates_never:
                raise RequestError(
                    f"train.{name} ({value}) needs evaluations, and train.evaluate_every says never; set it to auto"
                )
        if self.keep_best and Every.parse(self.save_every, "train.save_every", DEFAULT_STEPS).is_never:
            raise RequestError(
                "train.keep_best (true) needs checkpoints, or the run's last state would be lost, and train.save_every "
                "says never; set that to auto"
            )

    def _check_samples(self) -> None:
        _at_least("samples", self.samples, 0)
        _at_least("sample_tokens", self.sample_tokens, 1)
        given = {"samples": self.samples, "sample_tokens": self.sample_tokens}
        for name, value in given.items():
            if not value:
                continue
            remedy = f"{name} to {'0' if name == 'samples' else 'null'}"
            if self.evaluates_never:
                raise RequestError(
                    f"train.{name} ({value}) has no effect: train.evaluate_every says never; set {remedy}"
                )
            if not self.needs.generates:
                raise RequestError(
                    f"train.{name} ({value}) has no effect with train.objective: {self.objective}, whose rows ask "
                    f"nothing; "
                    f"set {remedy}"
                )
        if self.sample_tokens and self.samples == 0:
            raise RequestError(
                f"train.sample_tokens ({self.sample_tokens}) has no effect with train.samples: 0; set samples, or "
                "leave it out"
            )

    def _check_embedding(self) -> None:
        for name in ("pooling", "temperature"):
            value = getattr(self, name)
            if value is not None and self.objective != "embedding":
                raise RequestError(
                    f"train.{name} ({value}) has no effect with train.objective: {self.objective}; leave "
                    "it out: only embedding reads it"
                )
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise RequestError(f"train.pooling can't be '{self.pooling}'{did_you_mean(self.pooling, POOLINGS)}")
        if self.temperature is not None and not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise RequestError(f"train.temperature must be more than 0, not {self.temperature}; 0.05 is usual")

    @property
    def pooling_name(self) -> str:
        """`pooling`, filled in."""
        return self.pooling or DEFAULT_POOLING

    @property
    def similarity_temperature(self) -> float:
        """`temperature`, filled in."""
        return DEFAULT_TEMPERATURE if self.temperature is None else self.temperature

    @property
    def needs(self) -> Needs:
        """What the objective needs of the model and of the rows."""
        return NEEDS[self.objective]

    @property
    def micro_rows(self) -> int:
        """`micro_batch_size`, filled in."""
        assert self.micro_batch_size is not None
        return self.micro_batch_size

    @property
    def beta(self) -> float:
        """`dpo_beta`, filled in."""
        return DEFAULT_DPO_BETA if self.dpo_beta is None else self.dpo_beta

    @property
    def num_checkpoints(self) -> int | None:
        """How many checkpoints stay; None: all."""
        return DEFAULT_CHECKPOINTS if isinstance(self.keep_checkpoints, str) else self.keep_checkpoints

    @property
    def min_delta(self) -> float:
        """`early_stopping_min_delta`, filled in."""
        return self.early_stopping_min_delta or 0.0

    @property
    def needs_evaluation(self) -> dict[str, str]:
        """Settings that were asked for and that read the validation loss, as a run file writes them."""
        asked = {"keep_best": "true"} if self.keep_best else {}
        return asked if self.early_stopping is None else {**asked, "early_stopping": str(self.early_stopping)}

    @property
    def num_samples(self) -> int:
        """`samples`, filled in."""
        return DEFAULT_SAMPLES if self.samples is None else self.samples

    @property
    def longest_sample_tokens(self) -> int:
        """`sample_tokens`, filled in."""
        return DEFAULT_SAMPLE_TOKENS if self.sample_tokens is None else self.sample_tokens

    @property
    def evaluates_never(self) -> bool:
        """Whether evaluation while training was turned off."""
        return Every.parse(self.evaluate_every, "train.evaluate_every", DEFAULT_STEPS).is_never

    def num_rows(self, rows_per_epoch: int) -> int:
        """Rows seen in the whole run, repetitions counted."""
        if self.steps is not None:
            return self.steps * self.batch_size
        assert self.epochs is not None
        return max(1, round(self.epochs * rows_per_epoch))

    def num_steps(self, rows_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self.num_rows(rows_per_epoch) / self.batch_size)

    def warmup_steps(self, num_steps: int) -> int:
        """Steps of the warm-up.

        Raises: RequestError when the warm-up would take the whole run.
        """
        steps = int(self.warmup * num_steps) if self.warmup < 1 else int(self.warmup)
        if steps >= num_steps and steps > 0:
            raise RequestError(
                f"train.warmup ({self.warmup}) takes all of the run, {counted(num_steps, 'step')}; "
                "use fewer, or a fraction such as 0.05"
            )
        return steps


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise RequestError(f"train.{name} must be {least} or more, not {value}")
