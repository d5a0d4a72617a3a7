"""Threads for work that takes too long for the event loop, in a number that does not grow."""

import asyncio
import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from mla_jax.serve.http.api_error import busy
from mla_jax.serve.request import QueueFull

_WAITING_PER_THREAD = 16
_Result = TypeVar("_Result")


class Workers:
    """Some threads. Work in one of them cannot be ended: it keeps its thread when its client has left."""

    def __init__(self, num_threads: int):
        """Has at most `num_threads`, and 16 times as many who may wait for one."""
        self._threads = concurrent.futures.ThreadPoolExecutor(num_threads, "worker")
        self._places = asyncio.Semaphore(num_threads)
        self._num_waiting, self._most_waiting = 0, _WAITING_PER_THREAD * num_threads

    async def run(self, work: Callable[..., _Result], *args: Any) -> _Result:
        """Returns `work(*args)`, done in a thread. Who is cancelled while it waits for one leaves at once.

        Raises:
          ApiError: 429 if too many wait already.
        """
        if self._num_waiting >= self._most_waiting:
            raise busy(QueueFull(f"{self._num_waiting} requests wait to be read already."))
        self._num_waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._num_waiting -= 1
        loop = asyncio.get_running_loop()
        job = loop.run_in_executor(self._threads, functools.partial(work, *args))
        job.add_done_callback(self._end)
        await asyncio.wait(
            {job}
        )  # which does not cancel the job: that would free its place and not its thread
        return job.result()

    def _end(self, job):
        self._places.release()
        if not job.cancelled():
            job.exception()  # heard: whoever waited for it may have left
