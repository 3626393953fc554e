"""A lock as a dependency: taken before the endpoint runs, held until the response has been sent."""

from __future__ import annotations

import inspect
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from fastapi.params import Depends
from starlette.requests import HTTPConnection

from dotmac.platform.contrib.fastapi.askers import Asker, find_asker
from dotmac.platform.distributed_locks import DistributedLock, DistributedLockManager
from dotmac.platform.distributed_locks.naming import check_template, fill, roots
from dotmac.platform.errors import ConfigurationError, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from starlette.applications import Starlette

__all__ = ["lifespan", "lock"]

_STATE = "dotmac_locks"
_CONNECTION = "dotmac_connection"


def lock(
    template: str | Callable[..., str],
    timeout: float | None = None,
    *,
    manager: DistributedLockManager | None = None,
    blocking_timeout: float | None = None,
    auto_renewal: bool | None = None,
    on_lost: Literal["cancel", "flag"] | None = None,
) -> Callable[..., AsyncIterator[DistributedLock]]:
    """A dependency that holds a lock for the time of a request.

        UserLock = Annotated[DistributedLock, Depends(lock("user:{user_id}", blocking_timeout=2.0))]

        @app.put("/users/{user_id}")
        async def update(user_id: int, held: UserLock) -> None: ...

    Args:
        template: name of the lock; `{parameter}`, `{parameter.attribute}` and `{parameter[key]}` are filled
            from what FastAPI gives to the endpoint (or the dependency) that asks for the lock: parameters of
            path, query, header, cookie and body, and other dependencies. They are validated as declared
            there, and the OpenAPI document stays as it is. Parameters of the path need not be declared.
            Or a function that returns the name; its parameters are FastAPI's where they have annotations of
            their own, else they are the endpoint's.
        timeout: length of the lease, seconds; None for the manager's.
        manager: the lock manager; None takes that of the application, which `lifespan` has opened.
        blocking_timeout, auto_renewal, on_lost: as in `DistributedLockManager.acquire_lock`. Set the first:
            a request waits for its lock even after its client has left.
    Returns: what `Depends` takes; the endpoint gets the `DistributedLock`, held.
    Raises: InvalidArgument: the template or an argument can't be used; while FastAPI builds the route: the
        template does not fit the endpoint. In a request: LockTimeout, DeadlockDetected, ServerUnavailable,
        and LockLost, which ends an `async def` endpoint; see `install_error_handlers`.
    """
    template = check_template(template)
    if isinstance(template, str):
        for name in roots(template):
            if not name.isidentifier():
                raise InvalidArgument("template", template, f"{name!r} in braces is no parameter's name")
    return _LockDependency(template, timeout, manager, blocking_timeout, auto_renewal, on_lost)


def lifespan(
    manager: DistributedLockManager | None = None,
) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    """A lock manager for `lock` that is closed with the application: `FastAPI(lifespan=lifespan())`.

    Args:
        manager: the manager; None makes one from the configuration each time the application starts.
    """

    @asynccontextmanager
    async def run(app: Starlette) -> AsyncIterator[None]:
        async with DistributedLockManager() if manager is None else manager as opened:
            setattr(app.state, _STATE, opened)
            yield

    return run


# Equal where the arguments are, so that a request that asks twice for a lock holds it once.
@dataclass(frozen=True)
class _LockDependency:
    template: str | Callable[..., str]
    timeout: float | None
    manager: DistributedLockManager | None
    blocking_timeout: float | None
    auto_renewal: bool | None
    on_lost: Literal["cancel", "flag"] | None

    @property
    def __signature__(self) -> inspect.Signature:
        """What FastAPI has to pass: it asks for this while it builds the route of an endpoint."""
        connection = inspect.Parameter(_CONNECTION, inspect.Parameter.KEYWORD_ONLY, annotation=HTTPConnection)
        return inspect.Signature([connection, *self._parameters()])

    async def __call__(self, **values: Any) -> AsyncIterator[DistributedLock]:
        connection: HTTPConnection = values.pop(_CONNECTION)
        if callable(self.template):
            name = self.template(**values)
        else:
            name = fill(self.template, values, connection.url.path)
        held = self._manager(connection).acquire_lock(
            name,
            self.timeout,
            blocking_timeout=self.blocking_timeout,
            auto_renewal=self.auto_renewal,
            on_lost=self.on_lost,
        )
        async with held:
            yield held

    def _manager(self, connection: HTTPConnection) -> DistributedLockManager:
        if self.manager is not None:
            return self.manager
        manager = getattr(connection.app.state, _STATE, None)
        if not isinstance(manager, DistributedLockManager):
            raise ConfigurationError(
                f"the lock {self.template!r} has no manager: give lock(…, manager=…), or start the "
                "application with lifespan=dotmac.platform.contrib.fastapi.lifespan()"
            )
        return manager

    def _parameters(self) -> list[inspect.Parameter]:
        """What the name is made of; the types are the endpoint's, but for those that a function declares."""
        if isinstance(self.template, str):
            wanted = [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in roots(self.template)
            ]
        else:
            wanted = list(inspect.signature(self.template, eval_str=True).parameters.values())
        for parameter in wanted:
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise InvalidArgument("template", self.template, f"FastAPI can't give it {parameter}")
        asker = find_asker(self) if any(p.annotation is p.empty for p in wanted) else None
        found = [self._parameter(p, asker) if p.annotation is p.empty else p for p in wanted]
        return [p.replace(kind=p.KEYWORD_ONLY) for p in found if p is not None]

    def _parameter(self, wanted: inspect.Parameter, asker: Asker | None) -> inspect.Parameter | None:
        if asker is None:
            raise InvalidArgument(
                "template",
                self.template,
                "the endpoint that it is for is not to be seen from here; give a function whose parameters "
                "are annotated, as those of an endpoint, and which returns the name",
            )
        name = wanted.name
        parameter = asker.signature.parameters.get(name)
        if parameter is None and name in asker.in_path:
            return wanted.replace(annotation=str)
        if parameter is None and wanted.default is not wanted.empty:
            return None
        if parameter is None:
            known = ", ".join(dict.fromkeys([*asker.signature.parameters, *asker.in_path])) or "none"
            raise InvalidArgument(
                "template", self.template, f"{name!r} is no parameter of {asker.name}; it has: {known}"
            )
        if _asks_for(self, parameter):
            raise InvalidArgument("template", self.template, f"{name!r} is the lock itself")
        return parameter


def _asks_for(dependency: object, parameter: inspect.Parameter) -> bool:
    places = (parameter.default, *get_args(parameter.annotation)[1:])
    return any(isinstance(place, Depends) and place.dependency == dependency for place in places)
