"""Ctrl-C between iterations, so that a saved state is whole."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class InterruptedTwice(KeyboardInterrupt):
    """Within an iteration, whose state is not to be saved."""


@contextmanager
def whole_steps() -> Iterator[Callable[[], bool]]:
    """Make Ctrl-C wait for the iteration under way; yields a function: whether Ctrl-C came.

    A second Ctrl-C raises InterruptedTwice at once. Outside the main thread, which alone receives
    signals, nothing is changed.
    """
    interrupted = False

    def wait(*_: object) -> None:
        nonlocal interrupted
        if interrupted:
            raise InterruptedTwice(
                "interrupted twice; `resume=True` continues from the last checkpoint"
            )
        interrupted = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: interrupted
        return
    before = signal.signal(signal.SIGINT, wait)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, before)
