"""Bodies that run in pieces: a lock held from a generator's first item to its end.

Between two items the consumer runs, not the body. So a loss does not cancel the consumer's task there, which
would take it for a cancellation that somebody asked for; the body gets `LockLost` at its `yield` when it is
asked for the next item.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from dotmac.platform.distributed_locks.holding import Body
    from dotmac.platform.distributed_locks.lock import DistributedLock
    from dotmac.platform.distributed_locks.quorum import QuorumLock

    LockOf = Callable[[tuple[Any, ...], dict[str, Any]], DistributedLock | QuorumLock]

__all__ = ["asynchronous_generator", "generator"]


# Both give generator functions, as frameworks expect; so the first item's request looks at the arguments.
def generator(function: Callable[..., Generator[Any, Any, Any]], lock_of: LockOf) -> Callable[..., Any]:
    """A generator function that holds the lock of its call while `function`'s generator goes on."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with lock_of(args, kwargs) as lock:
            held = _held(lock)
            body = function(*args, **kwargs)
            step, given = body.send, None
            try:
                while True:
                    item = step(given)
                    held.suspend()
                    try:
                        step, given = body.send, (yield item)
                    except GeneratorExit:
                        raise
                    except BaseException as error:  # noqa: BLE001 - thrown in by the consumer, for the body
                        step, given = body.throw, error
                    if (lost := held.resume()) is not None:
                        step, given = body.throw, lost
            except StopIteration as end:
                return end.value
            finally:
                body.close()

    return call


def asynchronous_generator(
    function: Callable[..., AsyncGenerator[Any, Any]], lock_of: LockOf
) -> Callable[..., Any]:
    """The same for asynchronous generators, each item of which may be asked for by another task."""

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        async with lock_of(args, kwargs) as lock:
            held = _held(lock)
            body = _unwatched(function(*args, **kwargs))
            step, given = body.asend, None
            try:
                while True:
                    item = await step(given)
                    if held.cancelled:
                        # The body went on in spite of its cancellation; leaving the context says LockLost.
                        return
                    held.suspend()
                    try:
                        step, given = body.asend, (yield item)
                    except GeneratorExit:
                        raise
                    except BaseException as error:  # noqa: BLE001 - thrown in by the consumer, for the body
                        step, given = body.athrow, error
                    if (lost := held.resume()) is not None:
                        step, given = body.athrow, lost
            except StopAsyncIteration:
                return
            finally:
                await body.aclose()

    return call


def _unwatched(body: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
    """Keeps the loop, when it ends, from closing the body beside the generator that closes it."""
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)
    try:
        body.asend(None).close()
    finally:
        sys.set_asyncgen_hooks(*hooks)
    return body


def _held(lock: DistributedLock | QuorumLock) -> Body:
    held = lock._mine()  # noqa: SLF001 - what entering has just made
    assert held is not None
    return held
