"""Loggers: what they are given, and that none of them, however it fails, changes or stops a run."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import random
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankwise.cli.main import main
from rankwise.errors import RequestError
from rankwise.recipes.finetune import train
from rankwise.train import loggers
from rankwise.train.interrupt import Interrupted
from rankwise.train.loggers import LOGGERS, LoggedRun, LoggerKind
from tests.processes import Processes
from tests.recipes.runs import adapter_bytes, interrupting, metrics, settings, unmeasured


def run_of(files: Path, output: Path, *names: str, **more: Any) -> dict[str, Any]:
    changes = {"steps": 4, "samples": 0, "sample_tokens": None, "evaluate_every": 2, "save_every": 2}
    return settings(files, output, train={**changes, "loggers": list(names), **more})


@pytest.fixture(scope="module")
def plain(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without loggers."""
    output = tmp_path_factory.mktemp("plain") / "out"
    train(run_of(files, output), quiet=True)
    return output


class Fake:
    """A logger that prints and draws random numbers, and raises where it is told to."""

    def __init__(self, run: LoggedRun, fails_at: str = "", error: BaseException | None = None) -> None:
        self.run, self.fails_at, self.error = run, fails_at, error
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.closed = 0
        self._disturb("start")

    def _disturb(self, moment: str) -> None:
        print("printed by a logger")
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        if moment == self.fails_at:
            raise self.error or OSError(28, "No space left on device")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._disturb(f"step {step}")
        self.lines.append((step, dict(figures)))

    def close(self) -> None:
        self.closed += 1
        self._disturb("end")


def installed(monkeypatch: pytest.MonkeyPatch, name: str, *failing: Any) -> list[Fake]:
    """Puts a fake in the place of the logger `name`; gives those that were opened."""
    opened: list[Fake] = []

    def open_(run: LoggedRun) -> Fake:
        opened.append(Fake(run, *failing))
        return opened[-1]

    monkeypatch.setitem(LOGGERS, name, LoggerKind("json", open_))
    return opened


@pytest.mark.parametrize("moment", ["start", "step 1", "step 3", "end"])
def test_loggers_that_fail_stop_no_run(
    moment: str, files: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    error = {"step 3": SystemExit("gone"), "end": ValueError("many\nlines")}.get(moment)
    failing = {name: installed(monkeypatch, name, moment, error) for name in LOGGERS}
    train(run_of(files, tmp_path / "out", *LOGGERS))
    out, err = capsys.readouterr()
    warnings = [line for line in err.splitlines() if line.startswith("warning: the logger")]
    reason = {"step 3": "SystemExit: gone", "end": "ValueError: many lines"}.get(moment, "No space left on device")
    assert [line.split()[3] for line in warnings] == list(failing), "one warning for each"
    assert all("failed and is dropped (" in line and reason in line for line in warnings)
    assert out == "", "stdout is for results"
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(plain)
    assert unmeasured(metrics(tmp_path / "out")) == unmeasured(metrics(plain))
    expected = {"start": [], "step 1": [], "step 3": [1, 2], "end": [1, 2, 3, 4]}[moment]
    for opened in failing.values():
        assert [step for fake in opened for step, _ in fake.lines] == expected
        assert [fake.closed for fake in opened] == ([] if moment == "start" else [int(moment == "end")])


def test_it_is_given_the_lines_of_metrics(
    files: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, "mlflow", "step 1")
    opened = installed(monkeypatch, "wandb")
    run = run_of(files, tmp_path / "out", "mlflow", "wandb")
    with pytest.raises(Interrupted):
        train(run, on_step=interrupting(2), quiet=True)
    train(run, resume=True, quiet=True)
    before, after = opened
    lines = metrics(tmp_path / "out")
    assert [{"step": step, **figures} for step, figures in before.lines + after.lines] == lines
    assert (before.run.first_step, after.run.first_step) == (0, 2) and before.closed == after.closed == 1
    assert before.run.folder == tmp_path / "out" / "loggers" / "wandb" and before.run.name == "out"
    assert before.run.settings["train.lr"] == 1e-2 and before.run.settings["adapter.r"] == 4
    assert before.run.lasting_id == after.run.lasting_id != before.run.name
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(plain)


def test_statistics_go_to_loggers_and_change_nothing(
    files: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = installed(monkeypatch, "wandb")
    train(run_of(files, tmp_path / "out", "wandb", statistics=True), quiet=True)
    lines = metrics(tmp_path / "out")
    for line, (_, figures) in zip(lines, opened[0].lines, strict=True):
        assert figures["statistics/grad_norm/A"] == line["statistics"]["grad_norm"]["A"]
        assert {"A", "B", "q_proj", "layer 1"} <= set(line["statistics"]["weight_norm"])
    without = [{key: value for key, value in line.items() if key != "statistics"} for line in lines]
    assert unmeasured(without) == unmeasured(metrics(plain))
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(plain)


def _log_here(run: dict[str, Any]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        opened = installed(patch, "tensorboard")
        train(run, quiet=True)
    return len(opened)


def test_only_the_first_process_logs(files: Path, tmp_path: Path, two_processes: Processes) -> None:
    assert two_processes(_log_here, run_of(files, tmp_path / "out", "tensorboard", steps=2)) == [1, 0]


@pytest.mark.parametrize("name", LOGGERS)
def test_a_package_that_is_missing_is_said_before_anything_is_written(
    name: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    with pytest.raises(RequestError) as error:
        train(run_of(files, tmp_path / "out", name), quiet=True)
    assert f"train.loggers: {name} needs the package" in error.value.message
    assert f"pip install {LOGGERS[name].package}" in error.value.message and not (tmp_path / "out").exists()
    folder = importlib.machinery.ModuleSpec(name, None, is_package=True)  # a folder that is called so is no package
    monkeypatch.setattr(loggers, "find_spec", lambda package: folder)
    with pytest.raises(RequestError, match="which is not installed"):
        train(run_of(files, tmp_path / "out", name), quiet=True)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[tensorbord]", "train.loggers can't have 'tensorbord'; did you mean 'tensorboard'?"),
        ("[tensorboard,tensorboard]", "train.loggers names tensorboard twice"),
        ("tensorboard", "train.loggers must be a list, each item text, not 'tensorboard'"),
    ],
)
def test_wrong_names(
    value: str, words: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    run_file = tmp_path / "run.yaml"
    run_file.write_text(json.dumps(settings(files, Path("out"))))
    assert main(["train", str(run_file), f"train.loggers={value}"]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.logger
@pytest.mark.parametrize("name", LOGGERS)
def test_the_real_one_works_without_a_network(
    name: str, files: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spec = importlib.util.find_spec(LOGGERS[name].package)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {LOGGERS[name].package} is not installed")
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run = run_of(files, tmp_path / "out", name)
    with pytest.raises(Interrupted):
        train(run, on_step=interrupting(3))
    train(run, resume=True)
    out, err = capsys.readouterr()
    assert "warning" not in err and out == ""
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(plain)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    READ[name](tmp_path / "out")


def _read_tensorboard(output: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(output / "loggers" / "tensorboard")).Reload()
    for figure in ("loss", "lr", "grad_norm", "valid_loss"):
        lines = [(line["step"], line[figure]) for line in metrics(output) if figure in line]
        assert [(event.step, pytest.approx(event.value)) for event in found.Scalars(figure)] == lines


def _read_wandb(output: Path) -> None:
    assert list((output / "loggers" / "wandb").rglob("*.wandb"))


def _read_mlflow(output: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{output}/loggers/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("rankwise").experiment_id])
    lines = [(line["step"], pytest.approx(line["loss"])) for line in metrics(output)]
    assert [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss")] == lines
    assert run.info.status == "FINISHED" and run.data.params["train.lr"] == "0.01"


def _read_trackio(output: Path) -> None:
    assert (output / "loggers" / "trackio" / "id").is_file()


READ = {"tensorboard": _read_tensorboard, "wandb": _read_wandb, "mlflow": _read_mlflow, "trackio": _read_trackio}


def test_every_logger_has_a_reader() -> None:
    assert set(READ) == set(LOGGERS)
