"""Work as generators, which yield where it may be left for a while, and what whoever has begun it can do about it."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from functools import partial
from traceback import clear_frames
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
# How much is done, of how much; None where that is not known.
Done: TypeAlias = tuple[int, int] | None
# Whether Ctrl-C has come: its exception is lost in a callback of compiled code, or in an import that makes another.
_came = threading.Event()


def note_interrupts() -> None:
    """Have Ctrl-C noted from now on, beside the KeyboardInterrupt that it raises; one that is ignored stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _heard)


def interrupts_raise() -> bool:
    """Return whether Ctrl-C raises KeyboardInterrupt: nothing else handles or ignores it."""
    return signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _heard)


def _heard(number: int, frame: Any) -> None:
    """Handle the signal."""
    _came.set()
    raise KeyboardInterrupt


def interrupt_came() -> bool:
    """Return whether Ctrl-C has come."""
    return _came.is_set()


def check_interrupted() -> None:
    """Raise KeyboardInterrupt in the main thread, which is where it would have been raised, if Ctrl-C has come."""
    if interrupt_came() and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


class StoppedError(KeyboardInterrupt):
    """Work was stopped by whoever had begun it."""


class Control:
    """What whoever begins work keeps of it: a way to stop it, from any thread, and to hear how far it is.

    Args:
        hear: called by the work, where it may be left, with how much is done and of how much.

    Attributes:
        address: that of a string of C, which is empty until the work is stopped, for compiled code to look at.

    Example:
        >>> def work():
        ...     yield 1, 2
        ...     return 7
        ...
        >>> control = Control(lambda done, total: control.stop())
        >>> with control.over():
        ...     try:
        ...         by_turns([work()])
        ...     except StoppedError:
        ...         print("stopped")
        ...
        stopped
    """

    def __init__(self, hear: Callable[[int, int], object] = lambda done, total: None) -> None:
        self.hear, self._flag = hear, ctypes.create_string_buffer(2)
        self.address = ctypes.addressof(self._flag)

    @property
    def stopped(self) -> bool:
        """Whether the work is to end."""
        return bool(self._flag.value)

    def stop(self) -> None:
        """Have the work raise :class:`StoppedError` as soon as it can."""
        self._flag.value = b"1"

    def check(self) -> None:
        """Raise StoppedError if the work is to end."""
        if self._flag.value:
            raise StoppedError

    @contextmanager
    def over(self) -> Iterator[None]:
        """Enter a context in which this is the control of all work that is done there."""
        before = _control.set(self)
        try:
            yield
        finally:
            _control.reset(before)


_control: ContextVar[Control | None] = ContextVar("control", default=None)
_NOBODYS = Control()


def control() -> Control:
    """Return the control of what is done here; where nobody has set one, one that nobody hears or stops."""
    return _control.get() or _NOBODYS


def controllable() -> tuple[Control, Context]:
    """Return the control of what is done here, a new one where there is none, and a context for work under it."""
    own, context = _control.get() or Control(), copy_context()
    context.run(_control.set, own)
    return own, context


def outcomes(works: Sequence[Future[T]], own: Control) -> list[T]:
    """Return what works in other threads return, once all of them have ended, after Ctrl-C, too.

    Args:
        works: the works.
        own: their control, by which Ctrl-C stops them.

    Raises:
        Exception: what the first of them that fails raises.
        KeyboardInterrupt: if Ctrl-C came; StoppedError, if they were stopped otherwise.
    """
    interrupted = False
    while True:
        try:
            wait(works)
            break
        except KeyboardInterrupt:
            interrupted = True
            own.stop()
    stopped = [error for work in works if isinstance(error := work.exception(), StoppedError)]
    for error in stopped:
        clear_frames(error.__traceback__)  # which hold what was read
    if interrupted:
        raise KeyboardInterrupt
    if stopped:
        raise StoppedError
    return [work.result() for work in works]


def attended(call: Callable[[], T]) -> T:
    """Return what a long call of compiled code returns that looks at its :func:`control`; Ctrl-C stops it, too.

    Python hears of Ctrl-C in the main thread alone, and not during such a call: so that is made in another thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    own, context = controllable()
    with ThreadPoolExecutor(1) as pool:
        try:
            return outcomes([pool.submit(context.run, call)], own)[0]
        except KeyboardInterrupt:
            own.stop()
            raise


def finished(work: Generator[Done, None, T], pause: Callable[[], object] = lambda: None) -> T:
    """Run a generator to its end, and return what it returns.

    Args:
        work: the generator.
        pause: called where it yields.

    Raises:
        StoppedError: if the :func:`control` says so.

    Example:
        >>> def work():
        ...     yield
        ...     return 7
        ...
        >>> finished(work())
        7
    """
    own = control()
    while True:
        own.check()
        try:
            told = next(work)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if told is not None:
            own.hear(*told)
        pause()


def by_turns(works: Sequence[Generator[Done, None, T]], pause: Callable[[], object] = lambda: None) -> list[T]:
    """Run generators to their ends, each from one of its yields to the next in turn, and return what they return.

    The :func:`control` hears how much is done, in sum, as work within each tells it, too, and of work that took several
    turns that it ended. Those that have not begun are taken for as much as the others are in the mean. If one raises an
    exception, the others are closed, and it is raised.

    Args:
        works: the generators.
        pause: called where one has yielded.

    Raises:
        StoppedError: if the control says so.

    Example:
        >>> def work(steps):
        ...     for _ in range(steps):
        ...         yield
        ...     return steps
        ...
        >>> by_turns([work(3), work(1)])
        [3, 1]
    """
    found, going, own = dict[int, T](), dict(enumerate(works)), control()
    hear, every, took_turns = own.hear, _Sum(len(works), own.hear), False
    try:
        while going:
            for k, work in list(going.items()):
                own.check()
                own.hear, every.begun = partial(every.tell, k), max(every.begun, k + 1)
                try:
                    told = next(work)
                except StopIteration as end:
                    found[k], every.done[k] = end.value, every.total[k]
                    del going[k]
                    continue
                if told is not None:
                    every.done[k], every.total[k] = told
                pause()
            took_turns = took_turns or bool(going) or any(every.total)
            if going and any(every.total):
                hear(sum(every.done), sum(every.total))
    finally:
        own.hear = hear
        for work in going.values():
            work.close()
    if took_turns:
        hear(sum(every.total), sum(every.total))
    return list(map(found.__getitem__, range(len(works))))


class _Sum:
    """How much several works have done, of how much: those that have not begun are taken for the mean of the others."""

    def __init__(self, count: int, hear: Callable[[int, int], object]) -> None:
        self.done, self.total, self.begun, self._hear = [0] * count, [0] * count, 0, hear

    def tell(self, k: int, done: int, total: int) -> None:
        """Take note of what work k tells while it goes on, and pass the sum on unless that is all."""
        self.done[k], self.total[k] = done, total
        whole = sum(self.total) * len(self.total) // self.begun
        if sum(self.done) < whole:
            self._hear(sum(self.done), whole)
