"""What happens beside the main thread: work and batches done ahead in threads, and signals noted for later."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from tokenizer.errors import UserError
from training.task import Batch

Job = TypeVar("Job")
Result = TypeVar("Result")
BATCHES_AHEAD = 4
"""That a run's data thread makes before they are asked for."""


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
    """Draws from an iterator in a thread, a few items ahead; an error there is raised at the next item here."""

    def __init__(self, source: Iterator[Batch], ahead: int = BATCHES_AHEAD) -> None:
        self._queue: queue.Queue[tuple[Batch | None, BaseException | None]] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(source,), daemon=True)

    def __enter__(self) -> Prefetch:
        self._thread.start()
        return self

    def __next__(self) -> Batch:
        batch, error = self._queue.get()
        if error is not None:
            raise error
        assert batch is not None
        return batch

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.05)
        self._thread.join()

    def _fill(self, source: Iterator[Batch]) -> None:
        try:
            for batch in source:
                self._queue.put((batch, None))
                if self._closed.is_set():
                    return
            raise RuntimeError("the task's batches ended, but must be endless")
        except BaseException as error:  # handed over to the training thread, which raises it
            self._queue.put((None, error))


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
