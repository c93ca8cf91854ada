from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from rankwise.errors import RequestError
from rankwise.train import optimizers
from rankwise.train.config import OPTIMIZERS, Every, TrainConfig
from rankwise.train.needs import NEEDS


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "stf"}, ("stf", "sft")),
        ({"steps": 3, "epochs": 1}, ("train.steps", "train.epochs", "null")),
        ({"steps": 0}, ("train.steps", "1 or more", "0")),
        ({"epochs": 0}, ("train.epochs", "more than 0")),
        ({"batch_size": 0}, ("train.batch_size", "1 or more")),
        ({"batch_size": 4, "micro_batch_size": 8}, ("train.micro_batch_size (8)", "batch_size (4)", "set it to 4")),
        ({"lr": 0.0}, ("train.lr", "0.0")),
        ({"lr": float("nan")}, ("train.lr", "nan")),
        ({"schedule": "cos"}, ("train.schedule", "cosine")),
        ({"schedule": "constant", "lr_floor": 0.1}, ("lr_floor", "no effect", "constant")),
        ({"lr_floor": 1.5}, ("lr_floor", "1.5")),
        ({"warmup": -1}, ("train.warmup", "-1")),
        ({"warmup": 1.5}, ("train.warmup", "1.5")),
        ({"weight_decay": -0.1}, ("weight_decay", "-0.1")),
        ({"optimizer": "adam"}, ("train.optimizer", "adam", "adamw")),
        ({"loraplus_ratio": 0.0}, ("train.loraplus_ratio", "more than 0", "0.0")),
        ({"label_smoothing": 1.0}, ("train.label_smoothing", "below 1", "1.0")),
        ({"label_smoothing": -0.1}, ("train.label_smoothing", "-0.1")),
        ({"z_loss": -1e-4}, ("train.z_loss", "0 or more")),
        ({"z_loss": float("nan")}, ("train.z_loss", "nan")),
        ({"betas": (0.9, 1.0)}, ("betas", "1.0")),
        ({"max_grad_norm": -1.0}, ("max_grad_norm", "-1.0")),
        ({"precision": "fp8"}, ("fp8", "fp16")),
        ({"precision": "float32"}, ("train.precision", "fp32")),
        ({"save_every": "2 moons"}, ("train.save_every", "2 epochs", "2 moons")),
        ({"save_every": -3}, ("train.save_every", "-3")),
        ({"evaluate_every": "0 epochs"}, ("train.evaluate_every",)),
        ({"keep_checkpoints": 0}, ("keep_checkpoints", "1 or more")),
        ({"keep_checkpoints": "all"}, ("keep_checkpoints", "auto", "null for all", "'all'")),
        ({"keep_checkpoints": 3, "save_every": None}, ("train.keep_checkpoints (3)", "no effect", "save_every")),
        ({"keep_checkpoints": None, "save_every": 0}, ("train.keep_checkpoints (null)", "no effect", "leave it out")),
        ({"objective": "text", "samples": 2}, ("train.samples (2)", "no effect", "text", "set samples to 0")),
        ({"objective": "text", "sample_tokens": 9}, ("train.sample_tokens (9)", "no effect", "sample_tokens to null")),
        ({"samples": 0, "sample_tokens": 9}, ("train.sample_tokens (9)", "no effect", "train.samples: 0")),
        ({"evaluate_every": None, "sample_tokens": 9}, ("train.sample_tokens (9)", "no effect", "evaluate_every")),
        ({"evaluate_every": 0, "samples": 2}, ("train.samples", "no effect")),
        ({"seed": -1}, ("train.seed", "-1")),
    ],
)
def test_a_bad_value_is_one_line_that_names_it(settings: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as error:
        TrainConfig(**settings)
    assert all(word in error.value.message for word in words), error.value.message
    assert "\n" not in str(error.value)


def test_defaults_fill_in() -> None:
    assert TrainConfig().steps == 200
    assert TrainConfig(epochs=2).steps is None
    assert TrainConfig().micro_batch_size == 4
    assert TrainConfig(batch_size=2).micro_batch_size == 2


def test_length_of_a_run() -> None:
    assert TrainConfig(steps=7).num_steps(rows_per_epoch=10) == 7
    run = TrainConfig(epochs=3, batch_size=4)
    assert (run.num_rows(10), run.num_steps(10)) == (30, 8)
    assert TrainConfig(epochs=0.5, batch_size=4).num_steps(10) == 2


def test_warmup_in_steps_and_fractions() -> None:
    assert TrainConfig(warmup=0.05).warmup_steps(200) == 10
    assert TrainConfig(warmup=7).warmup_steps(200) == 7
    assert TrainConfig(warmup=0.05).warmup_steps(10) == 0
    with pytest.raises(RequestError, match="takes all of the run, 5 steps"):
        TrainConfig(warmup=5).warmup_steps(5)


@pytest.mark.parametrize("never", [None, 0, "0"])
def test_never(never: object) -> None:
    every = Every.parse(never, "x", num_steps=100)  # type: ignore[arg-type]
    assert every.is_never
    assert not any(every.due(step, 4, 10) for step in range(1, 100))


def test_every_counts_steps() -> None:
    for value in (3, "3", " 3 "):
        assert [s for s in range(1, 10) if Every.parse(value, "x", 100).due(s, 4, 10)] == [3, 6, 9]


def test_every_counts_parts_of_epochs_as_they_are_written() -> None:
    for text, rows, period in (("0.1 epochs", 30, 3), (".7 epochs", 30, 21), ("0.07 epochs", 100, 7)):
        assert [s for s in range(1, 64) if Every.parse(text, "x", 100).due(s, 1, rows)] == [*range(period, 64, period)]


def test_every_counts_epochs() -> None:
    # 4 rows a step and 10 an epoch: epochs end inside steps 3, 5, 8, 10
    assert [s for s in range(1, 11) if Every.parse("1 epoch", "x", 100).due(s, 4, 10)] == [3, 5, 8, 10]
    assert [s for s in range(1, 11) if Every.parse("2 epochs", "x", 100).due(s, 4, 10)] == [5, 10]
    assert [s for s in range(1, 6) if Every.parse("0.5 epochs", "x", 100).due(s, 4, 10)] == [2, 3, 4, 5]


def test_auto_is_ten_times_a_run() -> None:
    every = Every.parse("auto", "x", num_steps=95)
    assert sum(every.due(s, 1, 1) for s in range(1, 96)) == 9  # and the last step, which the caller adds


def test_no_torch_for_a_configuration() -> None:
    code = "import sys, rankwise.recipes.run, rankwise.cli.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss"])
def test_what_an_objective_without_token_losses_ignores_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NEEDS, "sft", dataclasses.replace(NEEDS["sft"], smooths=False))
    with pytest.raises(RequestError, match=rf"train\.{name} \(0\.1\) has no effect with train\.objective: sft; set it"):
        TrainConfig(**{name: 0.1})


def test_the_names_of_optimizers_are_those_that_can_be_made() -> None:
    assert tuple(optimizers.OPTIMIZERS) == OPTIMIZERS
