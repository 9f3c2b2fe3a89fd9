"""Ctrl-C, also where Python drops it."""

from __future__ import annotations

import _thread
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import sleep
from typing import Any


@contextmanager
def heard() -> Iterator[None]:
    """Let Ctrl-C end a command whenever it comes.

    The signal waits until Python code runs, and while garbage is collected that is a finalizer or the callback of a
    weak reference. An exception cannot leave those: Python hands it to `sys.unraisablehook` and goes on. Benchmarks
    collect garbage before each timed run, so their Ctrl-C often comes just then.
    """
    former = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            _thread.start_new_thread(_again, ())  # a signal from here would be raised in here
        else:
            former(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = former


def _again() -> None:
    sleep(0.01)  # until the callback is left; if it meets another one, the hook is told again
    os.kill(os.getpid(), signal.SIGINT)
