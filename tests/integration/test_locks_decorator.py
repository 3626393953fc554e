"""`with_lock` around functions of every kind.

Promises: each call holds the lock that its own arguments name, given by position, keyword or default, or
found by attribute or item, in a template or by a callable that names what it wants; functions, coroutine
functions, methods, class and static methods keep signature, name, documentation and kind, above and below
other decorators; a template or callable that does not fit is refused when the function is decorated, a value
that does not fit when it is called, and a body that would run after the lock's end is not run; FastAPI sees
the same parameters as without the decorator, and runs it.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from pydantic import BaseModel

from dotmac.platform.errors import DeadlockDetected, InvalidArgument, LockTimeout

if TYPE_CHECKING:
    from dotmac.platform.distributed_locks import DistributedLockManager


async def names(locks: DistributedLockManager) -> list[str]:
    return sorted(info.name for info in await locks.list_locks())


@dataclass
class User:
    id: int
    tags: dict[str, str]


async def test_coroutine_functions(locks: DistributedLockManager) -> None:
    @locks.with_lock("user:{user_id}:{kind}", timeout=5.0)
    async def update(
        user_id: str, data: dict[str, int], *, kind: str = "plain"
    ) -> tuple[list[str], dict[str, int]]:
        """Of a user."""
        return await names(locks), data

    data = {"a": 1}
    assert await update("7", data) == (["user:7:plain"], data)
    assert await update(data=data, user_id="8", kind="x") == (["user:8:x"], data)
    assert (await update("7", data))[1] is data
    assert await names(locks) == []
    assert update.__name__ == "update"
    assert update.__doc__ == "Of a user."
    assert asyncio.iscoroutinefunction(update)
    with pytest.raises(TypeError, match="data"):
        await update("7")  # type: ignore[call-arg]


async def test_functions(locks: DistributedLockManager) -> None:
    @locks.with_lock("job:{number}")
    def job(number: int) -> list[str]:
        return [info.name for info in locks.list_locks_sync()]

    assert await asyncio.to_thread(job, 3) == ["job:3"]
    assert not inspect.iscoroutinefunction(job)
    with pytest.raises(InvalidArgument, match="async with"):
        job(3)


async def test_methods(locks: DistributedLockManager) -> None:
    class Service:
        name = "s"

        def __init__(self) -> None:
            self.region = "eu"

        @locks.with_lock("{self.region}:{item}")
        async def method(self, item: int) -> list[str]:
            return await names(locks)

        @classmethod
        @locks.with_lock("{cls.name}:{item}")
        async def inner_class(cls, item: int) -> list[str]:
            return await names(locks)

        @locks.with_lock("{cls.name}:{item}")
        @classmethod
        async def outer_class(cls, item: int) -> list[str]:
            return await names(locks)

        @staticmethod
        @locks.with_lock("{item}")
        async def inner_static(item: int) -> list[str]:
            return await names(locks)

        @locks.with_lock("{item}")
        @staticmethod
        async def outer_static(item: int) -> list[str]:
            return await names(locks)

    assert await Service().method(1) == ["eu:1"]
    assert await Service.inner_class(2) == ["s:2"]
    assert await Service().outer_class(item=3) == ["s:3"]
    assert await Service.inner_static(4) == ["4"]
    assert await Service().outer_static(5) == ["5"]


async def test_one_above_the_other_and_callable_objects(locks: DistributedLockManager) -> None:
    @locks.with_lock("outer:{n}")
    @locks.with_lock("inner:{n}")
    async def both(n: int) -> list[str]:
        return await names(locks)

    assert await both(1) == ["inner:1", "outer:1"]

    class Callable:
        async def __call__(self, n: int) -> list[str]:
            return await names(locks)

    assert await locks.with_lock("object:{n}")(Callable())(2) == ["object:2"]


async def test_attributes_items_and_formats(locks: DistributedLockManager) -> None:
    user = User(7, {"team": "red"})

    @locks.with_lock("{user.id:04d}/{user.tags[team]}/{rows[0]}/{more[x]}/{user.id!r}/{{}}")
    async def work(user: User, rows: list[int], **more: object) -> list[str]:
        return await names(locks)

    assert await work(user, [9], x="y") == ["0007/red/9/y/7/{}"]
    for call in (lambda: work(None, [9], x=1), lambda: work(user, [], x=1), lambda: work(user, [9])):
        with pytest.raises(InvalidArgument, match="can't be filled from this call of .*work"):
            await call()

    @locks.with_lock("{args[1]}")
    async def rest(*args: str) -> list[str]:
        return await names(locks)

    assert await rest("a", "b") == ["b"]


async def test_callables_as_keys(locks: DistributedLockManager) -> None:
    @locks.with_lock(lambda user_id: f"user:{user_id}")
    async def one(user_id: str, data: int = 0) -> list[str]:
        return await names(locks)

    assert await one("7", 1) == await one(data=2, user_id="7") == ["user:7"]

    @locks.with_lock(lambda number, **rest: f"{number} {sorted(rest.items())}")
    async def defaults(number: int, /, kind: str = "plain", **more: int) -> list[str]:
        return await names(locks)

    assert await defaults(3, x=1) == ["3 [('kind', 'plain'), ('x', 1)]"]

    @locks.with_lock(lambda kind, rows, x=0: f"{kind}:{len(rows)}:{x}")
    async def many(*rows: int, kind: str, **more: int) -> list[str]:
        return await names(locks)

    assert await many(1, 2, kind="k") == ["k:2:0"]
    assert await many(kind="k", x=5) == ["k:0:5"]

    class Service:
        region = "eu"

        @locks.with_lock(lambda self, item: f"{self.region}:{item}")
        async def method(self, item: int) -> list[str]:
            return await names(locks)

        @locks.with_lock(lambda cls: cls.region)
        @classmethod
        async def of_class(cls) -> list[str]:
            return await names(locks)

    assert await Service().method(1) == ["eu:1"]
    assert await Service.of_class() == ["eu"]

    def key(user_id: str) -> str:
        raise LookupError(user_id)

    @locks.with_lock(key)
    async def failing(user_id: str) -> None:
        pytest.fail("it was called")

    with pytest.raises(LookupError, match="7"):
        await failing("7")

    @locks.with_lock(lambda user_id: user_id)
    async def no_name(user_id: object) -> None:
        pytest.fail("it was called")

    for wrong in (7, "", None):
        with pytest.raises(InvalidArgument, match="name"):
            await no_name(wrong)

    @locks.with_lock(lambda needed: needed)
    async def extras(**more: str) -> list[str]:
        return await names(locks)

    assert await extras(needed="n") == ["n"]
    with pytest.raises(InvalidArgument, match="this call of .*extras has no needed"):
        await extras(other="n")


def test_callables_that_do_not_fit_are_refused_at_once(locks_unused: DistributedLockManager) -> None:
    def function(user_id: str) -> None: ...

    async def coroutine(user_id: str) -> str:
        raise NotImplementedError

    for key, why in (
        (lambda user: user, "user is no parameter of .*function; it has: user_id"),
        (lambda user_id, /: user_id, "takes user_id by position"),
        (lambda *args: args[0], r"takes \*args by position"),
        (dict.get, "by position|can't be read"),
        (type, "can't be read|by position"),
        (coroutine, "not a coroutine"),
    ):
        with pytest.raises(InvalidArgument, match=why) as caught:
            locks_unused.with_lock(key)(function)
        assert caught.value.field == "template"


async def test_decorators_above_and_below(locks: DistributedLockManager) -> None:
    def counted(function: Any) -> Any:
        @functools.wraps(function)
        async def call(*args: Any, **kwargs: Any) -> Any:
            counts.append(await names(locks))
            return await function(*args, **kwargs)

        return call

    counts: list[list[str]] = []

    @counted
    @locks.with_lock("{n}")
    async def below(n: int) -> list[str]:
        return await names(locks)

    @locks.with_lock("{n}")
    @counted
    async def above(n: int) -> list[str]:
        return await names(locks)

    assert (await below(1), await above(2)) == (["1"], ["2"])
    assert counts == [[], ["2"]]
    cached = functools.lru_cache(locks.with_lock("cached:{n}")(lambda n: n + 1))
    assert await asyncio.to_thread(cached, 1) == cached(1) == 2

    async def two(n: int, m: int) -> list[str]:
        return await names(locks)

    assert await locks.with_lock("{n}:{m}")(functools.partial(two, m=5))(4) == ["4:5"]


async def test_a_body_that_would_run_without_the_lock(locks: DistributedLockManager) -> None:
    """Where a decorator below hides the kind of a function, the lock would end before the body begins."""

    def hiding(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return function(*args)

        return call

    @hiding
    async def coroutine() -> None:
        pytest.fail("it ran")

    @hiding
    def generator() -> Any:
        yield pytest.fail("it ran")

    @hiding
    async def agenerator() -> Any:
        yield pytest.fail("it ran")

    for function in (coroutine, generator, agenerator):
        with pytest.raises(InvalidArgument, match="would run without the lock"):
            await asyncio.to_thread(locks.with_lock("a")(function))
    assert await names(locks) == []


async def test_values_that_make_no_name(locks: DistributedLockManager) -> None:
    @locks.with_lock("{name}")
    async def work(name: str) -> None:
        pytest.fail("it was called")

    for name in ("", "x" * 1025, "a\0b", "\ud800"):
        with pytest.raises(InvalidArgument, match="name"):
            await work(name)


def test_bad_templates_are_refused_at_once(locks_unused: DistributedLockManager) -> None:
    def function(user_id: str) -> None: ...

    for template in (
        "{user}",
        "{}",
        "{0}",
        "{user_id",
        "user_id}",
        "{other.id}",
        "{ user_id}",
        "{user_id!z:}",
        "{user_id:{w}}",
    ):
        with pytest.raises(InvalidArgument, match="template") as caught:
            locks_unused.with_lock(template)(function)
        assert caught.value.field == "template"
    with pytest.raises(InvalidArgument, match="it has: user_id"):
        locks_unused.with_lock("{id}")(function)
    for template in ("", None, 7, b"a", ["a"], "x" * 1025):
        with pytest.raises(InvalidArgument, match="template"):
            locks_unused.with_lock(template)  # type: ignore[arg-type]
    for bad in ({"timeout": 0}, {"timeout": True}, {"blocking_timeout": -1}):
        with pytest.raises(InvalidArgument, match=next(iter(bad))):
            locks_unused.with_lock("a", **bad)
    with pytest.raises(InvalidArgument, match="with_lock"):
        locks_unused.with_lock("a")("not callable")  # type: ignore[type-var]


@pytest.fixture
def locks_unused(unique: str) -> DistributedLockManager:
    from support.locks import manager_at

    return manager_at("redis://127.0.0.1:1/0", unique)


def test_the_signature_is_unchanged(locks_unused: DistributedLockManager) -> None:
    async def plain(a: int, /, b: User, *c: str, d: float = 1.5, **e: bytes) -> list[int]:
        raise NotImplementedError

    def blocking(a: int, b: User | None = None) -> str:
        raise NotImplementedError

    for function in (plain, blocking):
        decorated = locks_unused.with_lock("{a}:{b}")(function)
        assert inspect.signature(decorated) == inspect.signature(function)
        assert inspect.get_annotations(decorated) == inspect.get_annotations(function)
        assert decorated.__qualname__ == function.__qualname__
        assert decorated.__module__ == function.__module__


async def test_calls_of_one_name_wait_for_each_other(locks: DistributedLockManager) -> None:
    inside = most = 0

    @locks.with_lock("one:{key}")
    async def work(key: str) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0.002)
        inside -= 1

    await asyncio.gather(*(work("a") for _ in range(20)))
    assert most == 1
    await asyncio.gather(*(work(str(n)) for n in range(20)))
    assert most > 1

    @locks.with_lock("one:a", blocking_timeout=0.05)
    async def impatient() -> None:
        pytest.fail("two holders")

    @locks.with_lock("one:a")
    async def recursive() -> None:
        await recursive()

    async with locks.acquire_lock("one:a", owner="somebody"):
        with pytest.raises(LockTimeout):
            await asyncio.create_task(impatient())
    with pytest.raises(DeadlockDetected):
        await recursive()


class Body(BaseModel):
    amount: int


async def tenant(x: int = 3) -> int:
    return x


Shop = Annotated[int, Depends(tenant)]


def application(wrap: Any, seen: list[Any], look: Any) -> FastAPI:
    """The same endpoints, decorated by `wrap` or not."""
    app = FastAPI(title="t")

    @app.put("/users/{user_id}")
    @wrap("user:{user_id}")
    async def update(user_id: str, data: dict[str, int], verbose: bool = False) -> dict[str, Any]:
        seen.append(await look())
        return {"user": user_id, "data": data, "verbose": verbose}

    @app.post("/orders/{number}")
    @wrap("order:{number}:{body.amount}")
    async def order(number: int, body: Body, tasks: BackgroundTasks, shop: Shop) -> Body:
        seen.append(await look())
        tasks.add_task(later, number)
        tasks.add_task(later_blocking, number)
        return body

    @app.get("/sync/{number}")
    @wrap("sync:{number}")
    def blocking(number: int) -> int:
        return number

    @wrap("later:{number}")
    async def later(number: int) -> None:
        seen.append(await look())

    @wrap("later:{number}")
    def later_blocking(number: int) -> None:
        seen.append(number)

    return app


async def test_fastapi_sees_no_difference(locks: DistributedLockManager) -> None:
    seen: list[Any] = []
    plain = application(lambda _: lambda function: function, [], lambda: names(locks))
    locked = application(locks.with_lock, seen, lambda: names(locks))
    answers: list[list[Any]] = []
    for app in (plain, locked):
        answers.append([])
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for method, url, body in (
                ("GET", "/openapi.json", None),
                ("PUT", "/users/7?verbose=1", {"a": 1}),
                ("PUT", "/users/7", {"a": "no number"}),
                ("POST", "/orders/3?x=5", {"amount": 4}),
                ("POST", "/orders/none", {"amount": 4}),
                ("POST", "/orders/3", {}),
                ("GET", "/sync/5", None),
                ("GET", "/sync/five", None),
            ):
                answer = await client.request(method, url, json=body)
                answers[-1].append((answer.status_code, answer.json()))
    assert answers[0] == answers[1]
    assert [status for status, _ in answers[1]] == [200, 200, 422, 200, 422, 422, 200, 422]
    assert seen == [["user:7"], ["order:3:4"], ["later:3"], 3]
    assert await names(locks) == []
