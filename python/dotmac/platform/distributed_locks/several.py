"""Several locks as one: all of them, or none."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack, ExitStack, suppress
from typing import TYPE_CHECKING, Self

from dotmac.platform.distributed_locks.arguments import patience_of
from dotmac.platform.errors import InvalidArgument, LockLost, LockNotOwned

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from dotmac.platform.distributed_locks.lock import DistributedLock

__all__ = ["SeveralLocks"]


class SeveralLocks:
    """Several locks held together, for `async with`, `with`, or by hand; of one task or thread at a time.

    They are acquired in the order of their names, whatever order was given, so that two that want the same
    ones never wait for one another. Where one can't be had, those acquired before it are given back.

    Args:
        names: names of the locks, in their order.
        make: makes the lock of a name that waits for so many seconds at most.
        patience: seconds to wait for all of them together; None without limit, 0 only tries.
    """

    __slots__ = ("_locks", "_make", "_patience", "_stack", "names")

    def __init__(
        self,
        names: Sequence[str],
        make: Callable[[str, float | None], DistributedLock],
        patience: float | None,
    ) -> None:
        self.names: tuple[str, ...] = tuple(names)
        self._make, self._patience = make, patience
        self._locks: dict[str, DistributedLock] = {}
        self._stack: AsyncExitStack | ExitStack | None = None

    def __repr__(self) -> str:
        return f"<SeveralLocks {', '.join(map(repr, self.names))} {'held' if self.held else 'not held'}>"

    @property
    def held(self) -> bool:
        """True while all of them are held, judged now."""
        return self._stack is not None and all(lock.held for lock in self._locks.values())

    @property
    def fencing_tokens(self) -> dict[str, int]:
        """The token of each, by name.

        Raises: LockNotOwned: they are not held. LockLost: one has ended.
        """
        if not self._locks:
            raise LockNotOwned(f"the locks {', '.join(map(repr, self.names))} are not held")
        return {name: lock.fencing_token for name, lock in self._locks.items()}

    @property
    def locks(self) -> dict[str, DistributedLock]:
        """Those that are held, by name."""
        return dict(self._locks)

    async def acquire(self, *, blocking: bool = True, blocking_timeout: float | None = None) -> bool:
        """Acquires all of them, or none.

        Args, Returns: as `DistributedLock.acquire`; the time is for all of them together.
        Raises: as there. LockLost: one had ended by the time that the last was had; the others are given
            back.
        """
        left = self._left(blocking, blocking_timeout)
        self._not_yet()
        async with AsyncExitStack() as stack:
            stack.callback(self._forget_failed)
            for name in self.names:
                lock = self._make(name, left())
                if not await lock.acquire():
                    return False
                stack.push_async_callback(_give_back, lock)
                self._locks[name] = lock
            self._still_held()
            stack.pop_all()
        self._stack = AsyncExitStack()
        for lock in self._locks.values():
            self._stack.push_async_callback(lock.release)
        return True

    async def release(self) -> None:
        """Gives all of them back.

        Raises: LockNotOwned: they are not held. LockLost: one had ended; the others are given back.
        """
        if isinstance(self._stack, ExitStack):
            raise InvalidArgument(
                "release", self.names, "they were acquired without an event loop: release_sync()"
            )
        stack = self._take()
        assert isinstance(stack, AsyncExitStack)
        await stack.aclose()

    async def __aenter__(self) -> Self:
        left = self._left(True, None)
        self._not_yet()
        async with AsyncExitStack() as stack:
            stack.callback(self._forget_failed)
            for name in self.names:
                self._locks[name] = await stack.enter_async_context(self._make(name, left()))
            self._still_held()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack = self._stack
        if isinstance(stack, AsyncExitStack):
            self._take()
            await stack.__aexit__(kind, error, trace)

    def acquire_sync(self, *, blocking: bool = True, blocking_timeout: float | None = None) -> bool:
        """`acquire` for threads without an event loop."""
        left = self._left(blocking, blocking_timeout)
        self._not_yet()
        with ExitStack() as stack:
            stack.callback(self._forget_failed)
            for name in self.names:
                lock = self._make(name, left())
                if not lock.acquire_sync():
                    return False
                stack.callback(_give_back_sync, lock)
                self._locks[name] = lock
            self._still_held()
            stack.pop_all()
        self._stack = ExitStack()
        for lock in self._locks.values():
            self._stack.callback(lock.release_sync)
        return True

    def release_sync(self) -> None:
        """`release` for threads without an event loop."""
        if isinstance(self._stack, AsyncExitStack):
            raise InvalidArgument(
                "release_sync", self.names, "they were acquired in an event loop: await release()"
            )
        stack = self._take()
        assert isinstance(stack, ExitStack)
        stack.close()

    def __enter__(self) -> Self:
        left = self._left(True, None)
        self._not_yet()
        with ExitStack() as stack:
            stack.callback(self._forget_failed)
            for name in self.names:
                self._locks[name] = stack.enter_context(self._make(name, left()))
            self._still_held()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack = self._stack
        if isinstance(stack, ExitStack):
            self._take()
            stack.__exit__(kind, error, trace)

    # ---- inside

    def _left(self, blocking: bool, blocking_timeout: float | None) -> Callable[[], float | None]:
        """What is left of the time for all, each time it is asked."""
        patience = patience_of(blocking, blocking_timeout, self._patience)
        if patience is None:
            return lambda: None
        end = time.monotonic() + patience
        return lambda: max(0.0, end - time.monotonic())

    def _not_yet(self) -> None:
        if self._stack is not None:
            raise LockNotOwned(
                f"the locks {', '.join(map(repr, self.names))} are held already; make an object per holder"
            )
        self._locks.clear()

    def _still_held(self) -> None:
        """The lease of one may have ended while the others were waited for.

        Raises: LockLost: it has.
        """
        for lock in self._locks.values():
            _ = lock.fencing_token

    def _take(self) -> AsyncExitStack | ExitStack:
        stack, self._stack = self._stack, None
        if stack is None:
            raise LockNotOwned(f"the locks {', '.join(map(repr, self.names))} are not held")
        self._locks.clear()
        return stack

    def _forget_failed(self) -> None:
        self._locks.clear()


async def _give_back(lock: DistributedLock) -> None:
    """Gives one back where not all can be had; that it had ended meanwhile is not what the caller asked."""
    with suppress(LockLost):
        await lock.release()


def _give_back_sync(lock: DistributedLock) -> None:
    with suppress(LockLost):
        lock.release_sync()
