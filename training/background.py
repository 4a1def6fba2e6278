"""What happens beside the main thread: work and batches done ahead in threads, and signals noted for later."""

from __future__ import annotations

import contextlib
import math
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tokenizer.errors import UserError
from training.task import Batch

Job = TypeVar("Job")
Result = TypeVar("Result")
BATCHES_AHEAD = 4
"""That a run's data thread makes before they are asked for."""
LAST_WAIT_S = 5.0
"""For the data thread, once something has failed."""
_ROOT, _PACKAGES = Path(__file__).resolve().parent.parent, ("tokenizer", "hybridlm", "training")


def in_order(
    jobs: Iterable[Job], work: Callable[[Job], Result], workers: int
) -> Iterator[tuple[Job, Result | UserError]]:
    """Run `work` in threads (decoding and encoding release the interpreter); a few jobs ahead, results in order.

    Bad input is a result, not an end: it comes as the `UserError` that the job raised.
    """
    waiting: deque[tuple[Job, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(workers)

    def oldest() -> tuple[Job, Result | UserError]:
        job, future = waiting.popleft()
        try:
            return job, future.result()
        except UserError as error:
            return job, error

    try:
        for job in jobs:
            waiting.append((job, pool.submit(work, job)))
            if len(waiting) > 2 * workers:
                yield oldest()
        while waiting:
            yield oldest()
    finally:
        pool.shutdown(cancel_futures=True)


class Prefetch:
    """Draws from an iterator in a thread, a few items ahead; an error there is raised at the next item here.

    Args:
        source: Gives the items.
        ahead: How many are made before they are asked for.
        warning_s: Wait for an item after which `tell` is told where the thread is; again whenever the wait has doubled.
        limit_s: Wait after which there is an error; None: never.
        tell: Takes a line for a person.
    """

    def __init__(
        self,
        source: Iterator[Batch],
        ahead: int = BATCHES_AHEAD,
        *,
        warning_s: float = 60.0,
        limit_s: float | None = None,
        tell: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self._queue: queue.Queue[tuple[Batch | None, BaseException | None]] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(source,), name="data", daemon=True)
        self._warning_s, self._limit_s, self._tell = warning_s, limit_s, tell

    def __enter__(self) -> Prefetch:
        self._thread.start()
        return self

    def __next__(self) -> Batch:
        """The next item.

        Raises:
            UserError: it did not come within `limit_s`.
        """
        began, warning = time.monotonic(), self._warning_s
        while True:
            waited = time.monotonic() - began
            left = min(warning, math.inf if self._limit_s is None else self._limit_s) - waited
            try:
                batch, error = self._queue.get(timeout=max(left, 0.0) + 0.001)
            except queue.Empty:
                waited = time.monotonic() - began
                what = f"no batch for {waited:.3g} s; the data thread is {whereabouts(self._thread)}"
                if self._limit_s is not None and waited >= self._limit_s:
                    raise UserError(f"{what}; look at that disk, or raise stall_limit_s={self._limit_s:g}") from None
                if waited >= warning:
                    self._tell(f"warning: {what}")
                    warning *= 2
                continue
            if error is not None:
                raise error
            assert batch is not None
            return batch

    def __exit__(self, kind: object, *_: object) -> None:
        self._closed.set()
        # A thread that hangs must not keep back the error that ends the run.
        until = math.inf if kind is None else time.monotonic() + LAST_WAIT_S
        while self._thread.is_alive() and time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.05)

    def _fill(self, source: Iterator[Batch]) -> None:
        try:
            for batch in source:
                self._queue.put((batch, None))
                if self._closed.is_set():
                    return
            raise RuntimeError("the task's batches ended, but must be endless")
        except BaseException as error:  # handed over to the training thread, which raises it
            self._queue.put((None, error))


def whereabouts(thread: threading.Thread) -> str:
    """Which of this project's functions a thread is in, and the file that it seems to be at."""
    frame = sys._current_frames().get(thread.ident or 0)
    place, file = "", ""
    while frame is not None:
        code, local = frame.f_code, frame.f_locals
        package, name = Path(code.co_filename).parts[-2:]
        if not place and package in _PACKAGES and Path(code.co_filename).parent.parent == _ROOT:
            place = f"in {code.co_name}, {package}/{name}:{frame.f_lineno}"
        # The innermost path that a function, or the object whose method it is, has in hand.
        about = (*local.values(), *getattr(local.get("self"), "__dict__", {}).values())
        file = file or next((str(value) for value in about if isinstance(value, Path) and value.is_absolute()), "")
        frame = frame.f_back
    return (place or "at work") + (f", at {file}" if file else "")


class Interrupts:
    """Notes the first SIGINT or SIGTERM in `caught`; a second one acts as usual, at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.caught = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, *_: object) -> None:
        self.caught = True
        self.__exit__()
