"""Signal handling: SIGINT, SIGTERM and SIGHUP end a command with one sentence, or let training save first.

Python runs a handler between two bytecodes of the main thread, which a compilation by XLA holds for minutes. An
exception raised there (KeyboardInterrupt) comes out wherever the thread is: JAX's callbacks ignore it, and shutting the
interpreter down below XLA's threads is a segmentation fault. So no handler raises. The C part of Python's handlers
writes the number of the signal to a socket, and a thread of this module reads it and ends the process by `os._exit`.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# `timeout`, a terminal and launchers send one signal to a process and to its group: the second is not a second wish.
_SECONDS_OF_ONE_SIGNAL = 0.2


class _Deferral:
    """A block whose first signal is only recorded: what has been received, and what is printed then."""

    def __init__(self, sentence: Callable[[], str], child: subprocess.Popen | None):
        self.received: list[int] = []
        self.sentence, self.child = sentence, child


# One process has one set of handlers, so this is state of the module. What the watcher thread reads is replaced as one
# reference, never changed in place, but for the set, which it copies.
_advice: str | None = None
_deferral: _Deferral | None = None
_lock = threading.Lock()
_temporary: set[Path] = set()
_ending = False


@contextlib.contextmanager
def end_on_signal(advice: str) -> Iterator[None]:
    """For the block, a signal ends the process with one sentence, which ends in `advice`, and status 128 + signal.

    Paths of `removed_on_signal` are removed first. Outside of the main thread, where Python installs no handlers, does
    nothing.
    """
    global _advice
    _advice = advice
    try:
        with _watched():
            yield
    finally:
        _advice = None


def end_on_interrupt() -> None:
    """Makes Ctrl-C end the process without a traceback until `end_on_signal`, while a command imports its modules."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))


@contextlib.contextmanager
def signal_advice(advice: str) -> Iterator[None]:
    """For the block, another `advice` of `end_on_signal`; does nothing outside of one, as in a notebook."""
    global _advice
    before = _advice
    _advice = before and advice
    try:
        yield
    finally:
        _advice = before


@contextlib.contextmanager
def deferred(sentence: Callable[[], str], child: subprocess.Popen | None = None) -> Iterator[list[int]]:
    """For the block, the first signal prints a sentence and becomes an entry of the list yielded; the second ends.

    A signal just before the end of the block is in the list after it. `child` receives the first signal as well.
    """
    global _deferral
    with contextlib.ExitStack() as stack:
        if _advice is None:
            stack.enter_context(end_on_signal("unfinished work is lost"))
        install_handlers()
        _deferral = _Deferral(sentence, child)
        received = _deferral.received
        try:
            yield received
        finally:
            with _lock:
                _deferral = None


@contextlib.contextmanager
def removed_on_signal(path: Path) -> Iterator[None]:
    """Names a temporary file or folder that a signal's end removes; the block removes it otherwise."""
    _temporary.add(path)
    try:
        yield
    finally:
        _temporary.discard(path)


def install_handlers() -> None:
    """Installs the handlers of `end_on_signal` again, after jax.distributed took SIGTERM for itself."""
    if _advice is None or threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        # nohup ignores SIGHUP on purpose.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _pause)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Handlers and the thread behind them for a block; afterwards what was there before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True)
    watcher.start()
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    install_handlers()
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: a handler that is not Python's.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(previous)
        # The watcher reads the end of the stream, after what was sent before.
        writer.close()
        watcher.join()
        reader.close()


def _pause(number: int, frame: FrameType | None) -> None:
    """In the main thread, gives the watcher time to decide: when it ends the process, nothing more is written."""
    time.sleep(0.05)
    while _ending:
        time.sleep(1)


def _watch(reader: socket.socket) -> None:
    acted = float("-inf")
    while numbers := reader.recv(4096):
        for number in numbers:
            now = time.monotonic()
            if number in _SIGNALS and now - acted > _SECONDS_OF_ONE_SIGNAL:
                acted = now
                _act(number)


def _act(number: int) -> None:
    with _lock:
        deferral = _deferral
        ends = deferral is None or bool(deferral.received)
        if deferral is not None:
            deferral.received.append(number)
    if deferral is not None and deferral.child:
        deferral.child.send_signal(number)
    if ends:
        _end(number)
    elif deferral is not None:
        _print(deferral.sentence())


def _end(number: int) -> None:
    global _ending
    _ending = True
    try:
        for path in list(_temporary):
            _remove(path)
        _print(f"stopped by {signal.Signals(number).name}; {_advice}")
    finally:
        os._exit(128 + number)


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    # Other threads may still be adding files: then the folder is not empty, and the next round removes them.
    for _ in range(3):
        shutil.rmtree(path, ignore_errors=True)


def _print(text: str) -> None:
    """Writes to stderr past Python's buffer, whose lock the main thread may hold."""
    # A terminal that was closed (SIGHUP) cannot be written to, and that must not keep the process.
    with contextlib.suppress(OSError):
        # On a terminal, below the bar and the ^C.
        start = "\n" if os.isatty(2) else ""
        os.write(2, f"{start}{text}\n".encode())
