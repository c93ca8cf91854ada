"""Where else than metrics.jsonl a run's figures may go: TensorBoard, Weights & Biases, MLflow, trackio.

All of them work without a network. What they do on failure is not theirs to say: `rankwise.train.log.Loggers` calls
them, and drops one that fails. No package is imported before a run asks for it.
"""

from __future__ import annotations

import netrc
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rankwise.errors import RequestError
from rankwise.files import write_text

PROJECT = "rankwise"
"""What runs are gathered under, unless the logger's own environment variable names another project."""


@dataclass(frozen=True)
class LoggedRun:
    """What a logger is told of a run.

    Args:
        name: of the output folder.
        folder: where the logger may write.
        settings: of the run, flat (`train.lr`).
        first_step: the step that a resumed run goes on after; 0 for a new run.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    first_step: int = 0

    @property
    def lasting_id(self) -> str:
        """A name that no other run has, the same when the run is resumed."""
        path = self.folder / "id"
        if not path.is_file():
            write_text(path, f"{self.name}-{secrets.token_hex(4)}")
        return path.read_text(encoding="utf-8")


class Logger(Protocol):
    """Takes figures. Any of its methods may raise anything."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of a step."""
        ...

    def close(self) -> None:
        """Writes what is left; nothing comes after it."""
        ...


class _TensorBoard:
    """Event files. Of a resumed run, what a lost part wrote is hidden."""

    def __init__(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purged = run.first_step + 1 if run.first_step else None
        self._writer = SummaryWriter(str(run.folder), purge_step=purged)
        rows = "\n".join(f"| {name} | {value} |" for name, value in run.settings.items())
        self._writer.add_text("run", f"| setting | value |\n|---|---|\n{rows}", run.first_step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """Offline (for `wandb sync`), unless WANDB_MODE says otherwise or there is a login."""

    def __init__(self, run: LoggedRun) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.lasting_id,
            resume="allow",
            dir=str(run.folder),
            mode=_wandb_mode(),
            config=dict(run.settings),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb_mode() -> Any:
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return mode
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        has_login = netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        has_login = False
    return "online" if has_login or os.environ.get("WANDB_API_KEY") else "offline"


class _MLflow:
    """A SQLite file in the run's folder, or what MLFLOW_TRACKING_URI names."""

    def __init__(self, run: LoggedRun) -> None:
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        self._metric = Metric
        store = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run.folder / 'mlflow.db'}")
        self._client = MlflowClient(store, store)
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        artifacts = (run.folder / "artifacts").as_uri()
        number = found.experiment_id if found else self._client.create_experiment(experiment, artifacts)
        same = f"tags.rankwise = '{run.lasting_id}'"
        before = self._client.search_runs([number], same, max_results=1)
        if before:
            self._id = before[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"rankwise": run.lasting_id}
        self._id = self._client.create_run(number, tags=tags, run_name=run.name).info.run_id
        params = [Param(name, str(value)[:500]) for name, value in run.settings.items()]
        self._client.log_batch(self._id, params=params)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        now_ms = time.time_ns() // 1_000_000
        self._client.log_batch(self._id, [self._metric(name, value, now_ms, step) for name, value in figures.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _Trackio:
    """trackio's own store on this machine, which `trackio show` reads (TRACKIO_DIR moves it)."""

    def __init__(self, run: LoggedRun) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._finish = trackio.finish  # the run's own `finish` is called again when Python ends, and prints
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run.lasting_id,
            resume="allow",
            config=dict(run.settings),
            embed=False,
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._finish()


@dataclass(frozen=True)
class LoggerKind:
    """The package that a logger needs, and what opens it."""

    package: str
    open: Callable[[LoggedRun], Logger]


LOGGERS: dict[str, LoggerKind] = {
    "tensorboard": LoggerKind("tensorboard", _TensorBoard),
    "wandb": LoggerKind("wandb", _WandB),
    "mlflow": LoggerKind("mlflow", _MLflow),
    "trackio": LoggerKind("trackio", _Trackio),
}


def check_installed(names: Iterable[str]) -> None:
    """Raises: RequestError for a logger whose package is not installed."""
    for name in names:
        package = LOGGERS[name].package
        found = find_spec(package)
        if found is None or found.origin is None:  # no origin: a folder that happens to be called so
            raise RequestError(
                f"train.loggers: {name} needs the package {package}, which is not installed; pip install {package} "
                "(or 'rankwise[loggers]' for all), or leave it out"
            )
