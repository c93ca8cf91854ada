"""Ctrl-C ends a run at the next step's end, after a checkpoint; a second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from rankwise.errors import WorkError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(WorkError):  # noqa: N818 (nothing went wrong)
    """The run was asked to stop; what it had learned is in its last checkpoint."""


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets `asked`; the next one acts as it did before.

    Outside the main thread, where Python cannot take signals over, it never becomes true.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._take)
        return self

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            # None: a handler that Python did not install; it can't be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
