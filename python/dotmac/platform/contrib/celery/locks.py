"""Celery tasks that hold a lock while they run: `@app.task(base=LockedTask, lock="report:{report_id}")`.

`with_lock` below `@app.task` holds a lock as well, and waits for it. This base class can also skip the task
or try it again later, gives the task its lock, and lets coroutines see `self.request`.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import AsyncExitStack, ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from celery import Task  # type: ignore[import-untyped]

from dotmac.platform.connection import background
from dotmac.platform.distributed_locks import DistributedLock, DistributedLockManager
from dotmac.platform.distributed_locks.arguments import check_patience, check_timeout
from dotmac.platform.distributed_locks.decorator import called_by_celery
from dotmac.platform.distributed_locks.naming import check_template, name_of_call
from dotmac.platform.errors import InvalidArgument, LockNotOwned, LockTimeout
from dotmac.platform.observability.unified_logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

__all__ = ["LockedTask"]

_log = get_logger(__name__)
_POLICIES = ("wait", "skip", "retry")


class _Running(NamedTuple):
    lock: DistributedLock
    request: Any


class _NotFreeError(Exception):
    """The task's own lock was not to be had; not to be confused with a LockTimeout out of its body."""

    def __init__(self, error: LockTimeout) -> None:
        super().__init__(str(error))
        self.error = error


@functools.cache
def _configured() -> DistributedLockManager:
    return DistributedLockManager()


class LockedTask(Task):  # type: ignore[misc]
    """Base of tasks that hold a lock while they run, in every pool of a worker, sync or `async def`.

        @app.task(base=LockedTask, lock="report:{report_id}", lock_if_held="skip")
        def generate(report_id: int) -> None: ...

    Options of `@app.task`, or attributes of a class of your own; they are checked when the task is made:
        lock: name of the lock, filled from the task's arguments, or a function; as in
            `DistributedLockManager.with_lock`.
        lock_manager: the manager; None takes one that is made from the configuration and shared by all.
        lock_timeout: length of the lease, seconds; None for the manager's. It is renewed while the task
            runs; it is how long others wait after a worker was killed.
        lock_if_held: what to do if somebody else holds the lock: "wait" for it, "skip" the task (it succeeds,
            its result is None), or "retry" it later, at most `max_retries` times, after which it fails as
            LockTimeout.
        lock_blocking_timeout: seconds to wait first; None waits without limit for "wait", else not at all.
            After it "wait" fails as LockTimeout.
        lock_retry_in: seconds until "retry" tries again.

    An `async def` task runs to its end on the platform's event loop, which lives as long as the process; if
    no worker runs it, calling it gives a coroutine. A task that loses its lock fails as LockLost: a coroutine
    is cancelled, a function is only told when it ends.

    Raises: InvalidArgument: an option can't be used, or the template does not fit the task.
    """

    abstract = True
    lock: ClassVar[Any] = None
    lock_manager: DistributedLockManager | None = None
    lock_timeout: float | None = None
    lock_blocking_timeout: float | None = None
    lock_if_held: Literal["wait", "skip", "retry"] = "wait"
    lock_retry_in: float = 5.0
    _running: ClassVar[ContextVar[_Running | None]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        run = cls.__dict__.get("run")
        if run is None:
            return  # a base of other tasks
        cls._check_options()
        cls._running = ContextVar(f"{cls.__qualname__}.running", default=None)
        cls.run = _locked(run, inspect.getattr_static(cls, "lock"))

    @property
    def held_lock(self) -> DistributedLock:
        """The lock of the task that runs here, for its fencing token and for whether it is lost.

        Raises: LockNotOwned: the task does not run here.
        """
        running = self._running.get()
        if running is None:
            raise LockNotOwned(f"task {self.name} does not run here, so that it holds no lock")
        return running.lock

    @property
    def request(self) -> Any:
        """What is executed; in coroutines as well, which run in another thread than the worker's."""
        running = self._running.get()
        if running is not None and self.request_stack.top is None:
            return running.request
        return self._get_request()

    @classmethod
    def _check_options(cls) -> None:
        if cls.lock_if_held not in _POLICIES:
            raise InvalidArgument(
                "lock_if_held", cls.lock_if_held, f"it must be one of {', '.join(_POLICIES)}"
            )
        if cls.lock_timeout is not None:
            check_timeout(cls.lock_timeout, "lock_timeout")
        check_patience(cls.lock_blocking_timeout, "lock_blocking_timeout")
        if check_patience(cls.lock_retry_in, "lock_retry_in") is None:
            raise InvalidArgument("lock_retry_in", None, "it must be a number of seconds")
        if cls.lock_manager is not None and not isinstance(cls.lock_manager, DistributedLockManager):
            raise InvalidArgument("lock_manager", cls.lock_manager, "it must be a DistributedLockManager")

    def _lock_named(self, name: str) -> DistributedLock:
        patience = self.lock_blocking_timeout
        if patience is None and self.lock_if_held != "wait":
            patience = 0.0
        manager = self.lock_manager or _configured()
        return manager.acquire_lock(name, self.lock_timeout, blocking_timeout=patience)

    @contextmanager
    def _runs(self, running: _Running) -> Iterator[None]:
        token = self._running.set(running)
        try:
            yield
        finally:
            self._running.reset(token)

    def _hold(self, lock: DistributedLock, body: Callable[[], Any]) -> Any:
        with ExitStack() as stack:
            try:
                stack.enter_context(lock)
            except LockTimeout as error:
                return self._not_free(error)
            with self._runs(_Running(lock, self.request)):
                return body()

    async def _hold_coroutine(
        self, lock: DistributedLock, body: Callable[[], Coroutine[Any, Any, Any]], request: Any
    ) -> Any:
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(lock)
            except LockTimeout as error:
                raise _NotFreeError(error) from error
            with self._runs(_Running(lock, request)):
                return await body()

    async def _directly(self, work: Coroutine[Any, Any, Any]) -> Any:
        try:
            return await work
        except _NotFreeError as held:
            return self._not_free(held.error)

    def _not_free(self, error: LockTimeout) -> None:
        if self.lock_if_held == "wait":
            raise error
        _log.info(
            "task not run: its lock is held", task=self.name, id=self.request.id, then=self.lock_if_held
        )
        if self.lock_if_held == "retry":
            raise self.retry(exc=error, countdown=self.lock_retry_in)


def _locked(run: Any, template: Any) -> Any:
    """`run` of a task class, with the lock around it, as a method."""
    static = isinstance(run, staticmethod)
    function = run.__func__ if static else run
    if isinstance(template, staticmethod):
        template = template.__func__
    if template is None:
        raise InvalidArgument(
            "lock", None, 'say which: @app.task(base=LockedTask, lock="report:{report_id}")'
        )
    name_of = name_of_call(check_template(template), function)

    # Under whatever Celery wraps around `run` later: so `autoretry_for` sees what the lock raises.
    @functools.wraps(function)
    def held(self: LockedTask, *args: Any, **kwargs: Any) -> Any:
        given = args if static else (self, *args)
        lock = self._lock_named(name_of(given, kwargs))
        if not inspect.iscoroutinefunction(function):
            return self._hold(lock, lambda: function(*given, **kwargs))
        work = self._hold_coroutine(lock, lambda: function(*given, **kwargs), self.request)
        if not called_by_celery():
            return self._directly(work)
        try:
            return background.run(work)
        except _NotFreeError as not_free:
            return self._not_free(not_free.error)

    if static:
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        signature = inspect.signature(function)
        held.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[own, *signature.parameters.values()]
        )
    return held
