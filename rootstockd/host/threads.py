"""What may take long, or never end, as with a file system or a directory of users that does not answer: in a thread.

It is one of its own, which nobody has to wait for: a process ends without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def in_thread(ask: Callable[..., Result], *arguments: object) -> Result:
    """What `ask` gives or raises, which the loop does not wait for.

    Unlike `asyncio.to_thread`, which has few threads for all and waits for them at the end: one that hangs is in
    nobody's way here.

    Raises:
        RuntimeError: there are as many threads as there may be.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if answer.done():  # nobody waits for it any more
            return
        if error is None:
            answer.set_result(result)  # type: ignore[arg-type]
        else:
            answer.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = ask(*arguments)
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name=getattr(ask, "__name__", None), daemon=True).start()
    return await answer


def within(seconds: float, ask: Callable[[], Result]) -> Result | None:
    """What `ask` gives or raises, which is waited for; None if that takes longer.

    Raises:
        RuntimeError: there are as many threads as there may be.
    """
    done: list[Result] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            done.append(ask())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, name=getattr(ask, "__name__", None), daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    return done[0] if done else None
