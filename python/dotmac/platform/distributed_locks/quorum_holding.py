"""One holder's leases on several servers: taken in rounds, kept while a majority stands, given back together.

All of this runs on the background loop, so that it goes on while the holder's own loop is busy, and so that
holders in threads need nothing else. `acquire`, `release` and `extend` are coroutines of that loop; the rest
may be called from everywhere.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from dotmac.platform import _semconv
from dotmac.platform.connection import background
from dotmac.platform.distributed_locks.holding import Body, current_task
from dotmac.platform.distributed_locks.quorum_token import QuorumToken
from dotmac.platform.errors import DotmacError, ForkedHandle, LockLost, LockTimeout, ServerUnavailable
from dotmac.platform.observability import metrics
from dotmac.platform.observability.unified_logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

    from dotmac.platform.distributed_locks.lock import DistributedLock
    from dotmac.platform.distributed_locks.manager import DistributedLockManager

__all__ = ["QuorumHolding", "Servers"]

_log = get_logger(__name__)
T = TypeVar("T")
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.005, 0.2
_LONGEST_REPAIR = 5.0


class Servers:
    """The servers of a quorum.

    Args:
        managers: one per server.
        limit: seconds that a server may take for an answer before a round goes on without it.
    """

    def __init__(self, managers: Sequence[DistributedLockManager], limit: float) -> None:
        self.managers = tuple(managers)
        self.limit = limit
        self.majority = len(self.managers) // 2 + 1
        # Those that did not answer when last asked. Rounds do not wait for them unless they have to.
        self.doubtful: set[int] = set()

    def __len__(self) -> int:
        return len(self.managers)


class QuorumHolding(Body):
    """Leases of one name on a majority of servers.

    Args:
        servers: all of them.
        name: the lock.
        timeout: length of each lease, seconds.
        renewal: renew the leases, and take those again that are missing, while a majority stands.
        loop: the holder's event loop, which is told of a loss; None for a thread.
    """

    __slots__ = (
        "_ended",
        "_locks",
        "_loop",
        "_pid",
        "_releases",
        "_renewal",
        "_servers",
        "_tasks",
        "_timeout",
        "_why",
        "over",
    )

    def __init__(
        self,
        servers: Servers,
        name: str,
        timeout: float,
        *,
        renewal: bool,
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        super().__init__(name, current_task(), asynchronous=loop is not None)
        self._servers, self._timeout, self._renewal, self._loop = servers, timeout, renewal, loop
        self._locks: list[DistributedLock | None] = [None] * len(servers)
        self._why: dict[int, str] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._releases: set[asyncio.Task[DotmacError | None]] = set()
        self._ended: Future[str | None] = Future()
        self._pid = os.getpid()
        self.over = False

    def __str__(self) -> str:
        return f"lock {self.name!r}"

    # ---- from everywhere

    @property
    def held(self) -> bool:
        self._check_process()
        return not self.over and self.reason is None and self._standing() >= self._servers.majority

    @property
    def inherited(self) -> bool:
        """True in a forked child, for what is its parent's."""
        return self._pid != os.getpid()

    @property
    def remaining(self) -> float:
        """Seconds until too few leases are left, if no further heartbeat is confirmed.

        Raises: LockLost: too few are left.
        """
        left = sorted(self._of_standing(lambda lock: lock.remaining).values(), reverse=True)
        return left[self._servers.majority - 1]

    @property
    def token(self) -> QuorumToken:
        """The tokens of the leases that stand now.

        Raises: LockLost: too few are left.
        """
        tokens = self._of_standing(lambda lock: lock.fencing_token)
        return QuorumToken(tokens.get(number) for number in range(len(self._servers)))

    def loss(self) -> str | None:
        if self.reason is None and not self.over and self._standing() < self._servers.majority:
            return self._account()
        return self.reason

    async def end(self) -> str | None:
        reason = self.loss()
        if reason is not None:
            return reason
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()

        def wake(_: Future[str | None]) -> None:
            with suppress(RuntimeError):  # that loop was closed
                loop.call_soon_threadsafe(_set, waiter)

        self._ended.add_done_callback(wake)
        await waiter
        return self._ended.result()

    def settle(self) -> None:
        self.over = True

    def forget(self) -> None:
        """Nobody waits for it or holds it any more: it is given back, now or when it has been granted."""
        if not self.inherited:
            background.submit(self._let_go())

    # ---- on the background loop

    async def acquire(self, patience: float | None) -> None:
        """Takes a majority of leases.

        Args: patience: seconds to try; None without limit, 0 for one round.
        Raises: LockTimeout: not in that time. ServerUnavailable: too few servers answer.
        """
        loop = asyncio.get_running_loop()
        begun, limit = loop.time(), self._servers.limit
        for pause in _pauses():
            if await self._round(limit):
                self._hold_on()
                return
            waited = loop.time() - begun
            if patience is None:
                await asyncio.sleep(pause)
                continue
            if waited >= patience:
                metrics.counter(_semconv.LOCK_TIMEOUTS).add(1)
                raise LockTimeout(
                    f"lock {self.name!r} was not granted by {self._servers.majority} of {len(self._servers)} "
                    f"servers within {waited:.2f} s: {self._account()}"
                )
            await asyncio.sleep(min(pause, patience - waited))
            limit = max(min(self._servers.limit, begun + patience - loop.time()), _SHORTEST_PAUSE)

    async def release(self) -> None:
        """Gives all leases back; returns when a majority of servers has confirmed it.

        The rest is given back as soon as those servers answer.

        Raises: LockLost: the majority was lost before. ServerUnavailable: too few have confirmed.
        """
        self._check_process()
        if self.reason is not None:
            raise self.lost_error()
        self._stop()
        try:
            await self._by_majority("releasing", lambda lock: lock.release())
        finally:
            self._finish(None)

    async def extend(self, timeout: float) -> None:
        """Sets the length of the leases anew, on a majority at least.

        Raises: LockLost, ServerUnavailable: as `release`.
        """
        self._check_process()
        if self.reason is not None:
            raise self.lost_error()
        await self._by_majority("extending", lambda lock: lock.extend(timeout))
        self._timeout = timeout

    async def _round(self, limit: float) -> bool:
        """Asks all servers at once; True as soon as a majority has granted, False once none can be had."""
        servers = self._servers
        self._locks, self._why = [None] * len(servers), {}
        waiting = {
            asyncio.create_task(self._try(number, self._locks)): number for number in range(len(servers))
        }
        end = asyncio.get_running_loop().time() + limit
        granted = False
        try:
            while (verdict := self._verdict(waiting.values())) is None:
                left = end - asyncio.get_running_loop().time()
                done, _ = await asyncio.wait(
                    waiting, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    self._why |= dict.fromkeys(waiting.values(), f"no answer within {limit:g} s")
                    if limit >= servers.limit:
                        servers.doubtful.update(waiting.values())
                    break
                for task in done:
                    del waiting[task]
                    task.result()
            granted = bool(verdict)
        finally:
            if not granted:
                for task in waiting:
                    task.cancel()
                self._drop_all()
        if granted:
            for task in waiting:
                # Whoever answers late is welcome, where somebody looks after it.
                if self._renewal:
                    self._keep(task)
                else:
                    task.cancel()
            return True
        missing = sum(number in servers.doubtful for number in range(len(servers)))
        if len(servers) - missing < servers.majority:
            raise ServerUnavailable(
                f"acquiring lock {self.name!r}: only {len(servers) - missing} of {len(servers)} servers "
                f"answer, {servers.majority} are needed: {self._account()}"
            )
        return False

    def _verdict(self, waiting: Any) -> bool | None:
        """True with a majority, False if none is to be expected, None while that is open."""
        servers = self._servers
        granted = self._standing()
        if granted >= servers.majority:
            return True
        unanswered = set(waiting)
        prompt = len(servers) - len(servers.doubtful)
        hopeful = unanswered - servers.doubtful if prompt >= servers.majority else unanswered
        return False if granted + len(hopeful) < servers.majority else None

    async def _try(self, number: int, locks: list[DistributedLock | None]) -> None:
        """Asks one server; whether it has granted is seen in `locks`."""
        # An owner that was never there before: what is still on its way from an earlier round is another's.
        lock = self._servers.managers[number].acquire_lock(
            self.name, self._timeout, auto_renewal=self._renewal, on_lost="flag", owner=secrets.token_hex(8)
        )
        try:
            if await lock.acquire(blocking=False):
                locks[number] = lock
            else:
                self._why[number] = "held by another"
        except DotmacError as error:
            self._servers.doubtful.add(number)
            self._why[number] = str(error)
        else:
            self._servers.doubtful.discard(number)

    def _hold_on(self) -> None:
        """A majority stands: from now on each server is watched."""
        for number in range(len(self._servers)):
            self._keep(asyncio.create_task(self._watch(number, self._locks)))

    async def _watch(self, number: int, locks: list[DistributedLock | None]) -> None:
        """Waits for the loss of one server's lease, and takes it again while a majority stands without it."""
        while True:
            lock = locks[number]
            if lock is not None:
                reason = await lock.lost
                if reason is None:
                    return
                locks[number] = None
                self._why[number] = reason
                self._drop(lock)
                if self._standing() < self._servers.majority:
                    self._lose()
                    return
            if not self._renewal:
                return
            await asyncio.sleep(min(self._timeout / 3, _LONGEST_REPAIR) * random.uniform(0.5, 1))  # noqa: S311
            if locks[number] is None:
                await self._try(number, locks)

    def _lose(self) -> None:
        """Too few leases are left: the holder is told, the others are given back."""
        if self.over or self.reason is not None:
            return
        self.reason = self._account()
        metrics.counter(_semconv.LOCK_LOSSES).add(1)
        _log.warning("lock lost", lock=self.name, reason=self.reason)
        if self._loop is not None:
            with suppress(RuntimeError):  # that loop was closed
                self._loop.call_soon_threadsafe(self.end_early, self.reason)
        self._stop()
        self._drop_all()
        self._finish(self.reason)

    async def _let_go(self) -> None:
        self._stop()
        self._drop_all()
        self._finish(None)

    async def _by_majority(
        self, what: str, call: Callable[[DistributedLock], Coroutine[Any, Any, None]]
    ) -> None:
        """Does something with every lease at once; returns when a majority of servers has confirmed it."""
        servers = self._servers
        waiting = {self._let_end(call(lock)) for lock in self._locks if lock is not None}
        confirmed, gone, problems = 0, 0, list[str]()
        while waiting and confirmed < servers.majority:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            waiting -= done
            for error in (task.result() for task in done):
                if error is None:
                    confirmed += 1
                elif isinstance(error, LockLost):
                    gone += 1
                else:
                    problems.append(str(error))
        if confirmed >= servers.majority:
            return
        if gone and confirmed + len(problems) < servers.majority:
            self.reason = f"{gone} of {len(servers)} servers had ended their leases"
            raise self.lost_error()
        raise ServerUnavailable(
            f"{what} lock {self.name!r}: confirmed by {confirmed} of {len(servers)} servers only, "
            f"{servers.majority} are needed: {'; '.join(problems)}"
        )

    def _standing(self) -> int:
        return sum(lock is not None and lock.held for lock in list(self._locks))

    def _account(self) -> str:
        """What became of the servers that do not grant it."""
        others = "; ".join(f"server {number}: {why}" for number, why in sorted(self._why.items()))
        return f"{self._standing()} of {len(self._servers)} servers grant it" + (
            f" ({others})" if others else ""
        )

    def _of_standing(self, what: Callable[[DistributedLock], T]) -> dict[int, T]:
        found = {}
        for number, lock in enumerate(list(self._locks)):
            if lock is not None:
                with suppress(LockLost):
                    found[number] = what(lock)
        if len(found) < self._servers.majority:
            raise self.lost_error()
        return found

    def _drop_all(self) -> None:
        for number, lock in enumerate(self._locks):
            if lock is not None:
                self._locks[number] = None
                self._drop(lock)

    def _drop(self, lock: DistributedLock) -> None:
        """Gives it back without waiting; the engine repeats it until the server has answered."""
        self._let_end(lock.release())

    def _let_end(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[DotmacError | None]:
        """Something that goes on to its end whatever becomes of this holding."""
        task = asyncio.create_task(_outcome(work))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)
        return task

    def _stop(self) -> None:
        """Ends what goes on for this holding; what was asked for and not answered is withdrawn."""
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()

    def _finish(self, reason: str | None) -> None:
        self.over = True
        if not self._ended.done():
            self._ended.set_result(reason)

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _check_process(self) -> None:
        if self.inherited:
            raise ForkedHandle(
                f"lock {self.name!r} is held by process {self._pid} "
                f"and was used in its forked child {os.getpid()}; acquire it anew there"
            )


async def _outcome(work: Coroutine[Any, Any, None]) -> DotmacError | None:
    try:
        await work
    except DotmacError as error:
        return error
    return None


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _pauses() -> Iterator[float]:
    """Longer and longer pauses between rounds, by chance, so that contenders do not meet again and again."""
    longest = _SHORTEST_PAUSE
    while True:
        yield random.uniform(_SHORTEST_PAUSE, longest * 2)  # noqa: S311 - nobody gains by guessing it
        longest = min(longest * 2, _LONGEST_PAUSE)
