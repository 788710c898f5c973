"""A server of ours in a thread of its own, while a test asks it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def in_a_thread(
    serve: Callable[[Callable[[str], None]], Coroutine[Any, Any, None]],
) -> Iterator[str]:
    """The address that a server says it is reached at; it is ended with the block."""
    said: list[str] = []
    tasks: list[Any] = []

    async def work() -> None:
        tasks.extend([asyncio.get_running_loop(), asyncio.current_task()])
        await serve(said.append)

    def go() -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(work())

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not said:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield said[0]
    finally:
        loop, task = tasks
        loop.call_soon_threadsafe(task.cancel)
        thread.join(timeout=30)
        assert not thread.is_alive()
