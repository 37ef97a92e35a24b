"""Work shared by threads whose results come in the order of what they are made of."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

#: Results that wait for an earlier one, for each thread. They hold whole videos.
_AHEAD = 2


def in_order[T, R](function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """``map``, by threads: decoding leaves the interpreter to others.

    Args:
        function: any thread may call it.
        items: read in the caller's thread, at most twice as many ahead as there are threads.
        workers: threads; with one, the caller's own does the work.

    Raises:
        Exception: the first that ``function`` raises, in the order of the items; what has not begun is given up.
    """
    if workers == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
