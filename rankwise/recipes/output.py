"""The output folder of a run: who may write into it, and what is in it.

adapter/            PEFT's format, the run's result
run.yaml            the run as it was resolved, enough to repeat it
metrics.jsonl       one line for each logged step
samples.jsonl       answers generated while training
conflict.jsonl      of several tasks: the cosines of their gradients by layer
summary.json        the run in a few figures
status.json         how the run stands: running, finished, stopped, failed
provenance.json     versions, commit, hashes of data, base and adapter
ranks.png           the rank map and its history, where a policy places ranks or layers differ
loggers/            what the loggers of `train.loggers` write
checkpoints/step-N/ what `--resume` goes on from
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from rankwise.errors import RequestError
from rankwise.files import obstacle, sweep, unreachable, write_json, write_text
from rankwise.recipes.names import (
    CONFLICT_FILE,
    JOB_FILE,
    LOCK_FILE,
    METRICS_FILE,
    PROVENANCE_FILE,
    RANKS_PICTURE,
    RUN_FILE,
    STATUS_FILE,
    SUMMARY_FILE,
)
from rankwise.train.log import JsonLines
from rankwise.train.state import ADAPTER, CHECKPOINTS

LOCK_WAIT_S = 0.2
"""`rankwise runs` looks at a lock for a moment; a run holds it for longer."""


class RunFolder:
    """Names of what is in an output folder. Making one touches nothing.

    Args:
        path: the folder, absolute.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / ADAPTER
        self.checkpoints = path / CHECKPOINTS
        self.loggers = path / "loggers"
        self.metrics = JsonLines(path / METRICS_FILE)
        self.samples = JsonLines(path / "samples.jsonl")
        self.conflict = JsonLines(path / CONFLICT_FILE)
        self.run_file = path / RUN_FILE
        self.summary = path / SUMMARY_FILE
        self.ranks_picture = path / RANKS_PICTURE

    def check(self, resume: bool) -> bool:
        """Whether the folder is there already: asked once, for another run may make it at any moment.

        Raises: RequestError when it exists and this is no resume, it is not a run's, or it can't be made.
        """
        found = unreachable(self.path)
        if found is not None or not self.path.exists():
            if (found := found or obstacle(self.path)) is not None:
                raise RequestError(f"output '{self.path}' can't be made: {found}; choose another")
            return False
        if not self.path.is_dir():
            raise RequestError(f"output '{self.path}' is a file; choose another folder")
        if not resume:
            raise RequestError(
                f"output '{self.path}' exists; choose another output, or go on with what is there by --resume"
            )
        # a run that was stopped before its run file was written leaves these alone, and half-written ones
        names = {entry.name for entry in self.path.iterdir()} - {LOCK_FILE, JOB_FILE, STATUS_FILE}
        if RUN_FILE not in names and not all(name.startswith(".") and name.endswith(".tmp") for name in names):
            raise RequestError(f"output '{self.path}' has no {RUN_FILE}: it is not a run's folder; choose another")
        return True

    def is_of(self, job: str | None) -> bool:
        """Whether the launch of torchrun that is named `job` has trained here: what it starts again goes on here."""
        file = self.path / JOB_FILE
        return job is not None and file.is_file() and file.read_text(encoding="utf-8") == job

    def take_over(self, job: str | None) -> None:
        """Notes for which launch of torchrun the folder is written now; None: for none."""
        if job is not None:
            write_text(self.path / JOB_FILE, job)
        else:
            (self.path / JOB_FILE).unlink(missing_ok=True)

    @property
    def is_finished(self) -> bool:
        """Whether a run has ended here."""
        return self.summary.exists()

    def create(self) -> None:
        """Makes the folder. Raises: RequestError when it can't be made, or another run was quicker."""
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            raise RequestError(
                f"output '{self.path}' was not there at the start, another run made it; choose another output, or wait "
                "for that run and go on with what is there by --resume"
            ) from None
        except OSError as error:
            raise RequestError(f"output '{self.path}' can't be made: {error.strerror}; choose another") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process. Raises: RequestError when a live run holds it."""
        lock = FileLock(self.path / LOCK_FILE)
        try:
            lock.acquire(timeout=LOCK_WAIT_S)
        except Timeout:
            raise RequestError(
                f"output '{self.path}' is in use by a run that is still going; wait for it, or choose another output"
            ) from None
        except OSError as error:
            raise RequestError(f"output '{self.path}' can't be written: {error.strerror}; choose another") from error
        try:
            yield
        finally:
            lock.release()

    def begin(self, step: int, run_yaml: str) -> None:
        """Makes the folder's files those of a run that stands at `step`: what a lost part of it wrote is dropped."""
        for folder in (self.path, self.adapter, self.checkpoints):
            sweep(folder)
        if self.metrics.path.exists() or step:
            self.metrics.drop_after(step)
        for lines in (self.samples, self.conflict):
            if lines.path.exists():
                lines.drop_after(step)
        write_text(self.run_file, run_yaml)

    def write_summary(self, summary: dict[str, object]) -> None:
        """Writes summary.json."""
        write_json(self.summary, summary)

    def write_status(self, status: str, num_steps: int, message: str | None = None) -> None:
        """Writes status.json: how the run stands, of how many steps, and what went wrong."""
        write_json(self.path / STATUS_FILE, {"status": status, "num_steps": num_steps, "message": message})

    def write_provenance(self, provenance: dict[str, object]) -> None:
        """Writes provenance.json."""
        write_json(self.path / PROVENANCE_FILE, provenance)
