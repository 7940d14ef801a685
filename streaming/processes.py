"""Child processes that are spawned, never forked, talk over a pipe, and do not outlive their parent.

A signal that asks the run to end (SIGTERM from a scheduler, Ctrl-C) reaches its whole process group. It is for the parent, which
may have much to finish before it stops its children: they have both signals blocked, from the first instant of their lives.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import platform
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any


class ChildDied(RuntimeError):  # noqa: N818
    """A child process ended without being asked to."""


class Child:
    """`target(connection, *args)` in a process of its own; in a thread of this one, the same code, where `threads` says so."""

    def __init__(self, name: str, target: Callable[..., None], args: tuple[Any, ...], threads: bool = False):
        self.name = name
        self.connection, theirs = multiprocessing.Pipe()
        self.process = None
        if threads:
            threading.Thread(target=_in_thread, args=(target, theirs, args), name=name, daemon=True).start()
        else:
            self.process = multiprocessing.get_context("spawn").Process(
                target=_in_process, args=(target, theirs, args), name=name, daemon=True
            )
            with _blocked(signal.SIGTERM, signal.SIGINT):  # a new process inherits what is blocked
                self.process.start()
            theirs.close()

    def receive(self) -> Any:
        """Its next message; an exception that ended it is raised here."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionError):
            raise self.died() from None
        if isinstance(message, Exception):
            raise message
        return message

    def send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionError):
            raise self.died() from None

    def died(self) -> Exception:
        """Why it did: the exception that it sent before, or how the process ended."""
        with contextlib.suppress(EOFError, ConnectionError):
            while self.connection.poll():
                message = self.connection.recv()
                if isinstance(message, Exception):
                    return message
        how = "ended"
        if self.process:
            self.process.join(5)
            code = self.process.exitcode
            if code is not None and code < 0:
                how = f"was killed by {signal.Signals(-code).name}"
                how += " (out of memory?)" if code == -signal.SIGKILL else ""
            else:
                how = f"ended with exit code {code}"
        return ChildDied(f"{self.name} {how}; what it wrote to stderr says more")

    def stop(self) -> None:
        stop([self])


class Inbox:
    """What a child is sent, taken from its pipe as it comes: a parent that sends much never waits for a child that waits until
    the parent receives. How much is under way is for the parent to bound."""

    def __init__(self, connection: Connection):
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._take, args=(connection,), daemon=True, name="inbox").start()

    def _take(self, connection: Connection) -> None:
        try:
            while True:
                self._messages.put((connection.recv(), None))
        except Exception as error:  # the end of the pipe, or a message that cannot be read
            self._messages.put((None, error))

    def receive(self, seconds: float | None = None) -> Any:
        """The next message; raises queue.Empty where none comes in so many seconds, and what ended the pipe at its end."""
        message, error = self._messages.get(timeout=seconds)
        if error is not None:
            raise error
        return message


def stop(children: Iterable[Child], patience: float = 5.0) -> None:
    """They see the end of their pipes and leave; those that have not after `patience` seconds are killed."""
    children, deadline = list(children), time.monotonic() + patience
    for child in children:
        child.connection.close()
    for process in (child.process for child in children if child.process):
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


@contextmanager
def _blocked(*signals: signal.Signals) -> Iterator[None]:
    resource_tracker.ensure_running()  # starting it unblocks them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_thread(target: Callable[..., None], connection: Connection, args: tuple[Any, ...]) -> None:
    with connection, contextlib.suppress(EOFError, ConnectionError):  # the parent closed its end
        try:
            target(connection, *args)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            connection.send(portable(error))


def _in_process(target: Callable[..., None], connection: Connection, args: tuple[Any, ...]) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    keep_freed_memory()
    _in_thread(target, connection, args)


def keep_freed_memory() -> None:
    """Tells glibc not to hand large freed blocks back to the kernel: on CPU, faulting them in again for every batch costs
    as much as the arithmetic (docs/LOG.md has the figures)."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        mallopt, mmap_threshold, trim_threshold = ctypes.CDLL(None).mallopt, -3, -1
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def end_with_parent() -> None:
    """This process is killed when the one that started it ends (the thread, to be exact), however that happens."""
    if sys.platform == "linux":
        parent, parent_death_signal = os.getppid(), 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended meanwhile
            os._exit(1)


def portable(error: Exception) -> Exception:
    """The error, to be raised in the parent, with the way that led to it here."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
