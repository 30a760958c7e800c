"""How a command ends before it is done: SIGTERM is taken as ctrl-C, and what it has started ends with it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a scheduler or `kill` sends it to this process alone."""


def heed_interrupts() -> None:
    """A job that a shell begins in the background ignores SIGINT, and so would its steps, which end by it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def _handled(handlers: dict[int, Any]) -> Iterator[None]:
    """Signals have these handlers here; only a process's main thread can say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def uninterrupted() -> AbstractContextManager[None]:
    """Ctrl-C and SIGTERM do nothing here, where what ends by itself is waited for."""
    return _handled({signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN})


def terminable() -> AbstractContextManager[None]:
    """SIGTERM raises `Terminated` here."""

    def terminate(*_) -> None:
        raise Terminated

    return _handled({signal.SIGTERM: terminate})
