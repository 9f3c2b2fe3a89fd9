"""Python's collector in a process that serves: it stops all threads while it looks at what might be garbage."""

from __future__ import annotations

import atexit
import gc


def freeze() -> None:
    """Let collections leave out what there is by now: looking at all of torch and transformers takes half a second."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries complain of what is never collected
