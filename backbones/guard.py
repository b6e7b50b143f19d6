"""Keeps what a plugin does while it is read from harming the program that reads it."""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from types import FrameType
from typing import Any


@contextmanager
def guarded() -> Iterator[list[str]]:
    """While it lasts, nothing is printed to stdout, `os._exit` raises SystemExit, and Ctrl-C is told from an exception.

    Yields:
        A list that has, afterwards, the names of what was changed for the whole program; all of it is put back.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C.
        SystemExit: something wanted to end the program.
        RuntimeError: it raised KeyboardInterrupt without being asked to.
    """
    changed: list[str] = []
    before = {name: read() for name, (read, _) in _STATES.items()}
    try:
        with redirect_stdout(sys.stderr), _no_exit(), _told_interrupts():
            yield changed
    finally:
        for name, (read, write) in _STATES.items():
            if read() != before[name]:
                changed.append(name)
                write(before[name])


@contextmanager
def _no_exit() -> Iterator[None]:
    def refuse(status: int) -> None:
        raise SystemExit(f"it called os._exit({status})")

    leave = os._exit
    os._exit = refuse  # type: ignore[assignment]  # it does not return either
    try:
        yield
    finally:
        os._exit = leave


@contextmanager
def _told_interrupts() -> Iterator[None]:
    pressed = []

    def handle(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    # Only the main thread hears of Ctrl-C and may set handlers, and one of the program's knows better what it means.
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    ours = in_main and handler is signal.default_int_handler
    theirs = in_main and not ours and handler not in (signal.SIG_IGN, signal.SIG_DFL)
    if ours:
        signal.signal(signal.SIGINT, handle)
    try:
        yield
    except KeyboardInterrupt as error:
        if pressed or theirs:
            raise
        raise RuntimeError("it raised KeyboardInterrupt, though nobody pressed Ctrl-C") from error
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _logging() -> tuple[int, int, list[logging.Handler]]:
    root = logging.getLogger()
    return logging.root.manager.disable, root.level, list(root.handlers)


def _set_logging(state: tuple[int, int, list[logging.Handler]]) -> None:
    disabled, level, handlers = state
    logging.disable(disabled)
    logging.getLogger().setLevel(level)
    logging.getLogger().handlers[:] = handlers


def _filters() -> list[Any]:
    return list(warnings.filters)


def _set_filters(filters: list[Any]) -> None:
    warnings.resetwarnings()  # so that what was cached under the others is forgotten, too
    warnings.filters[:] = filters  # type: ignore[index]  # it is a list


def _torch() -> tuple[Any, bool] | None:
    """torch's default dtype and grad mode; None for what they are when it is imported."""
    torch: Any = sys.modules.get("torch")
    if not hasattr(torch, "is_grad_enabled"):
        return None
    state = (torch.get_default_dtype(), torch.is_grad_enabled())
    return None if state == (torch.float32, True) else state


def _set_torch(state: tuple[Any, bool] | None) -> None:
    torch = sys.modules["torch"]
    dtype, grad = state or (torch.float32, True)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)


_STATES: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "the working directory": (os.getcwd, os.chdir),
    "the filters of warnings": (_filters, _set_filters),
    "the root logger": (_logging, _set_logging),
    "torch's default dtype or grad mode": (_torch, _set_torch),
}
