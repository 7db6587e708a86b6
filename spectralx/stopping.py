"""Stopping on request, between two steps: SIGTERM and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from spectralx.cli import StopRequested

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """While entered, a signal to stop is noted where a run is patient, obeyed at once elsewhere.

    A run is patient while it trains: it saves its state after the step and then calls `obey`. A
    second Ctrl-C is obeyed at once. Without effect outside the main thread, which gets no signals.

    Attributes
    ----------
    received : the signal, or None.
    patient : whether whoever runs will obey later.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.patient = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals (again: Lightning takes SIGTERM for itself when it starts)."""
        for number in self._before:
            signal.signal(number, self._note)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: what was there is not Python's
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received == signal.SIGINT == number
        self.received = signal.Signals(number)
        if again or not self.patient:
            self.obey("; the same command goes on from the state saved last")

    def receive(self, number: int) -> None:
        """Note a signal that another process got; 0 is none."""
        self.received = signal.Signals(number) if number else self.received

    def obey(self, where: str) -> None:
        """Raise what ends the run: KeyboardInterrupt, or StopRequested for SIGTERM."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt(f"interrupted{where}")
        raise StopRequested(f"stopped by SIGTERM{where}")
