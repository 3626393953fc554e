"""Locks as FastAPI dependencies, and the platform's errors as answers.

Promises: the template is filled from whatever FastAPI gives to the endpoint or dependency that asks (path,
query, header, body, another dependency), validated as declared there; the OpenAPI document and the answers
are those of the same application without locks; the lock is held until the whole response is sent, and free
after errors, after its client left, and after a loss, which ends the endpoint; asking twice in a request
holds once; overrides of dependencies change nothing; what can't work is refused while the route is built;
errors are answered by the documented status, `Retry-After` and code, without names of locks or servers;
generators under `with_lock` are dependencies; a manager lives and ends with its application.
"""

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import httpx
import pytest
import uvicorn
from fastapi import (
    APIRouter,
    Body,
    Depends,
    FastAPI,
    Header,
    HTTPException,
    Path,
    Query,
    WebSocket,
    WebSocketDisconnect,
)
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from dotmac.platform.contrib.fastapi import install_error_handlers, lifespan, lock
from dotmac.platform.contrib.fastapi.errors import STATUS
from dotmac.platform.distributed_locks import DistributedLock, DistributedLockManager
from dotmac.platform.errors import (
    ConfigurationError,
    DeadlockDetected,
    InvalidArgument,
    LockLost,
    LockTimeout,
    RequestTimeout,
    ServerUnavailable,
)
from support.locks import manager_at, until

UserId = Annotated[int, Path(description="whose", ge=1)]


class Order(BaseModel):
    customer: str
    amount: int = 1


@dataclass
class User:
    name: str


async def current_user(authorization: Annotated[str, Header()]) -> User:
    return User(authorization.removeprefix("Bearer "))


async def names(locks: DistributedLockManager) -> list[str]:
    return sorted(info.name for info in await locks.list_locks())


@contextlib.asynccontextmanager
async def client_of(app: FastAPI, *, raising: bool = True) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=raising)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def application(locks: DistributedLockManager, depends: Callable[..., Any]) -> FastAPI:
    """Endpoints of every kind; `depends` makes the dependencies, or others in their place."""
    app = FastAPI(title="t")

    @app.get("/path/{user_id}")
    async def path(user_id: UserId, held: Annotated[Any, depends("user:{user_id}")]) -> Any:
        return await names(locks)

    @app.get("/query")
    async def query(
        held: Annotated[Any, depends("{page}:{size}:{tags}")],
        page: Annotated[int, Query(alias="p", description="which")] = 1,
        size: int = 10,
        tags: Annotated[list[str] | None, Query()] = None,
    ) -> Any:
        return await names(locks)

    @app.get("/header")
    async def header(
        x_tenant: Annotated[str, Header(description="of whom")], held: Annotated[Any, depends("{x_tenant}")]
    ) -> Any:
        return await names(locks)

    @app.post("/body")
    async def body(order: Order, held: Annotated[Any, depends("{order.customer}:{order.amount:03d}")]) -> Any:
        return await names(locks)

    @app.post("/bodies")
    async def bodies(
        order: Order, note: Annotated[str, Body()], held: Annotated[Any, depends("{order.customer}:{note}")]
    ) -> Any:
        return await names(locks)

    @app.get("/user")
    async def user(
        me: Annotated[User, Depends(current_user)], held: Annotated[Any, depends("of {me.name}")]
    ) -> Any:
        return await names(locks)

    @app.get("/undeclared/{key}", dependencies=[depends("{key}")])
    async def undeclared(key: str) -> Any:
        return await names(locks)

    async def inner(number: int, held: Annotated[Any, depends("inner:{number}")]) -> int:
        return number

    @app.get("/nested/{number}")
    async def nested(number: str, found: Annotated[int, Depends(inner)]) -> Any:
        return [found, number, await names(locks)]

    router = APIRouter(prefix="/shops/{shop}", dependencies=[depends("shop:{shop}")])

    @router.get("/articles/{article}")
    async def article(shop: int, article: str, held: Annotated[Any, depends("{article}")]) -> Any:
        return await names(locks)

    app.include_router(router)

    @app.get("/function/{user_id}")
    async def function(
        user_id: int, held: Annotated[Any, depends(lambda user_id, kind="x": f"{kind}:{user_id + 1}")]
    ) -> Any:
        return await names(locks)

    @app.get("/sync/{key}")
    def sync(key: str, held: Annotated[Any, depends("{key}")]) -> Any:
        return sorted(info.name for info in locks.list_locks_sync())

    return app


REQUESTS: list[tuple[str, str, dict[str, Any], Any]] = [
    ("GET", "/path/7", {}, ["user:7"]),
    ("GET", "/path/07", {}, ["user:7"]),
    ("GET", "/path/0", {}, 422),
    ("GET", "/path/seven", {}, 422),
    ("GET", "/query", {}, ["1:10:None"]),
    ("GET", "/query?p=02&size=3&tags=a&tags=b", {}, ["2:3:['a', 'b']"]),
    ("GET", "/query?p=x", {}, 422),
    ("GET", "/header", {"headers": {"X-Tenant": "acme"}}, ["acme"]),
    ("GET", "/header", {}, 422),
    ("POST", "/body", {"json": {"customer": "ada", "amount": 5}}, ["ada:005"]),
    ("POST", "/body", {"json": {"customer": "ada"}}, ["ada:001"]),
    ("POST", "/body", {"json": {"amount": 5}}, 422),
    ("POST", "/bodies", {"json": {"order": {"customer": "ada"}, "note": "n"}}, ["ada:n"]),
    ("GET", "/user", {"headers": {"Authorization": "Bearer ada"}}, ["of ada"]),
    ("GET", "/user", {}, 422),
    ("GET", "/undeclared/a%20b", {}, ["a b"]),
    ("GET", "/nested/03", {}, [3, "03", ["inner:3"]]),
    ("GET", "/shops/07/articles/pear", {}, ["pear", "shop:7"]),
    ("GET", "/function/1", {}, ["x:2"]),
    ("GET", "/sync/k", {}, ["k"]),
]


async def test_every_source_and_no_other_difference(locks: DistributedLockManager) -> None:
    async def nothing() -> None: ...

    async def elsewhere() -> None:
        pytest.fail("this override has nothing to do with it")

    locked = application(locks, lambda template: Depends(lock(template, manager=locks)))
    bare = application(locks, lambda _: Depends(nothing))
    assert locked.openapi() == bare.openapi()
    # While anything is overridden, FastAPI builds all dependencies anew for each request.
    for overrides in ({}, {elsewhere: nothing}):
        locked.dependency_overrides.update(overrides)
        async with client_of(locked) as client, client_of(bare) as other:
            for method, url, more, expected in REQUESTS:
                answer = await client.request(method, url, **more)
                if expected == 422:
                    reference = await other.request(method, url, **more)
                    assert (answer.status_code, reference.status_code) == (422, 422), url
                    assert answer.json()["detail"][0] == reference.json()["detail"][0]
                else:
                    assert (answer.status_code, answer.json()) == (200, expected), url
    assert await names(locks) == []


async def test_the_endpoint_gets_the_lock(locks: DistributedLockManager) -> None:
    app = FastAPI()
    user_lock = Annotated[DistributedLock, Depends(lock("user:{user_id}", 7.0, manager=locks))]

    async def other(user_id: int, held: user_lock) -> DistributedLock:
        return held

    @app.get("/users/{user_id}")
    async def get(
        user_id: int, held: user_lock, same: Annotated[DistributedLock, Depends(other)]
    ) -> dict[str, Any]:
        assert same is held
        assert held.held
        return {"name": held.name, "fence": held.fencing_token, "timeout": held.timeout}

    # Equal locks are one, however they were made.
    @app.get("/again/{user_id}", dependencies=[Depends(lock("user:{user_id}", 7.0, manager=locks))])
    async def again(user_id: int, held: user_lock) -> int:
        return held.fencing_token

    async with client_of(app) as client:
        first = (await client.get("/users/3")).json()
        assert (first["name"], first["timeout"]) == ("user:3", 7.0)
        assert (await client.get("/again/3")).json() > first["fence"]


async def test_requests_of_one_name_wait_for_each_other(locks: DistributedLockManager) -> None:
    app = FastAPI()
    inside = most = 0

    @app.post("/users/{user_id}")
    async def post(user_id: int, held: Annotated[Any, Depends(lock("{user_id}", manager=locks))]) -> int:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0.002)
        inside -= 1
        return most

    async with client_of(app) as client:
        await asyncio.gather(*(client.post("/users/1") for _ in range(10)))
        assert most == 1
        await asyncio.gather(*(client.post(f"/users/{n}") for n in range(10)))
        assert most > 1


async def test_free_after_errors(locks: DistributedLockManager) -> None:
    app = FastAPI()
    a_lock = Annotated[Any, Depends(lock("a", manager=locks))]

    @app.get("/refuses")
    async def refuses(held: a_lock) -> None:
        raise HTTPException(418)

    @app.get("/fails")
    async def fails(held: a_lock) -> None:
        raise ZeroDivisionError

    @app.get("/invalid")
    async def invalid(held: a_lock, number: int) -> None: ...

    async with client_of(app, raising=False) as client:
        for url, status in (("/refuses", 418), ("/fails", 500), ("/invalid?number=x", 422)):
            assert (await client.get(url)).status_code == status
            assert await names(locks) == [], url


@contextlib.asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[int]:
    """The application behind a real server; its port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def test_held_until_the_whole_response_is_sent(locks: DistributedLockManager) -> None:
    app = FastAPI()
    go_on, during = asyncio.Event(), []

    @app.get("/stream/{key}")
    async def stream(key: str, held: Annotated[Any, Depends(lock("{key}", manager=locks))]) -> Any:
        async def parts() -> AsyncIterator[bytes]:
            yield b"first"
            await go_on.wait()
            during.append(await names(locks))
            yield b"last"

        return StreamingResponse(parts())

    async with served(app) as port, httpx.AsyncClient(timeout=20) as client:
        async with client.stream("GET", f"http://127.0.0.1:{port}/stream/a") as answer:
            chunks = answer.aiter_raw()
            assert await anext(chunks) == b"first"
            assert await names(locks) == ["a"]
            go_on.set()
            assert [chunk async for chunk in chunks] == [b"last"]
        assert during == [["a"]]
        while await names(locks):
            await asyncio.sleep(0.01)


async def test_free_after_the_client_left(locks: DistributedLockManager) -> None:
    app = FastAPI()

    @app.get("/stream/{key}")
    async def stream(key: str, held: Annotated[Any, Depends(lock("{key}", manager=locks))]) -> Any:
        async def parts() -> AsyncIterator[bytes]:
            while True:
                yield b"x" * 65_536
                await asyncio.sleep(0.01)

        return StreamingResponse(parts())

    async with served(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /stream/a HTTP/1.1\r\nHost: t\r\n\r\n")
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        assert await names(locks) == ["a"]
        writer.transport.abort()
        async with asyncio.timeout(20):
            while await names(locks):
                await asyncio.sleep(0.01)


async def test_a_loss_ends_the_endpoint(own_valkey: Any, unique: str) -> None:
    locks = manager_at(own_valkey.url, unique, default_timeout=0.5)
    app = FastAPI()
    install_error_handlers(app)
    ended = []

    @app.get("/")
    async def endless(held: Annotated[DistributedLock, Depends(lock("a", manager=locks))]) -> None:
        own_valkey.kill()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(bool(held.lost))

    async with client_of(app) as client:
        answer = await client.get("/")
    assert (answer.status_code, answer.json()["code"]) == (503, "lock.lost")
    assert "retry-after" not in answer.headers
    assert ended == [True]
    await locks.aclose()


async def test_errors_are_answered(locks: DistributedLockManager) -> None:
    app = FastAPI()
    install_error_handlers(app, retry_after=1.5)
    raised: list[Exception] = []

    @app.get("/locked")
    async def locked(held: Annotated[Any, Depends(lock("a", manager=locks, blocking_timeout=0))]) -> None:
        pytest.fail("it ran")

    @app.get("/fails")
    async def fails() -> None:
        raise raised[0]

    async with client_of(app) as client:
        async with locks.acquire_lock("a"):
            answer = await asyncio.create_task(client.get("/locked"))
        assert (answer.status_code, answer.headers["retry-after"]) == (423, "2")
        assert answer.json() == {
            "detail": "The lock was not granted within the blocking timeout.",
            "code": "lock.timeout",
        }
        for error, status, later in (
            (LockTimeout("secret"), 423, True),
            (DeadlockDetected("secret", ["a", "b"]), 409, True),
            (LockLost("secret"), 503, False),
            (ServerUnavailable("secret"), 503, True),
            (RequestTimeout("secret"), 503, True),
        ):
            raised[:] = [error]
            answer = await client.get("/fails")
            assert (answer.status_code, "retry-after" in answer.headers) == (status, later)
            assert answer.json()["code"] == error.code
            assert "secret" not in answer.text
        raised[:] = [InvalidArgument("a", "b", "c")]
        with pytest.raises(InvalidArgument):
            await client.get("/fails")
    for bad in (-1, float("inf"), "1", None):
        with pytest.raises(InvalidArgument, match="retry_after"):
            install_error_handlers(FastAPI(), retry_after=bad)  # type: ignore[arg-type]


def test_the_documented_statuses() -> None:
    from dotmac.platform.contrib.fastapi import errors

    for kind, status in STATUS.items():
        assert f"| `{kind.__name__}`" in errors.__doc__
        row = next(line for line in errors.__doc__.splitlines() if f"`{kind.__name__}` " in line)
        assert f" {status} " in row


class Session:
    """A client's side of a WebSocket, without a network."""

    def __init__(self, app: FastAPI, path: str) -> None:
        self._sent, self._received = asyncio.Queue[Any](), asyncio.Queue[Any]()
        self._sent.put_nowait({"type": "websocket.connect"})
        scope = {"type": "websocket", "path": path, "headers": [], "query_string": b"", "scheme": "ws"}
        self._task = asyncio.create_task(app(scope, self._sent.get, self._received.put))

    async def get(self) -> dict[str, Any]:
        return await self._received.get()

    async def leave(self) -> None:
        self._sent.put_nowait({"type": "websocket.disconnect", "code": 1000})
        await self._task


async def test_websockets(locks: DistributedLockManager) -> None:
    app = FastAPI()
    install_error_handlers(app)

    @app.websocket("/rooms/{room}")
    async def room(
        websocket: WebSocket,
        room: int,
        held: Annotated[DistributedLock, Depends(lock("room:{room}", blocking_timeout=0, manager=locks))],
    ) -> None:
        await websocket.accept()
        await websocket.send_text(held.name)
        with contextlib.suppress(WebSocketDisconnect):
            await websocket.receive_text()

    one = Session(app, "/rooms/07")
    assert (await one.get())["type"] == "websocket.accept"
    assert (await one.get())["text"] == "room:7"
    refused = Session(app, "/rooms/7")
    answer = await refused.get()
    assert (answer["type"], answer["code"]) == ("websocket.close", 1013)
    await refused.leave()
    other = Session(app, "/rooms/8")
    assert [(await other.get())["type"] for _ in range(2)] == ["websocket.accept", "websocket.send"]
    await one.leave()
    await other.leave()
    assert await names(locks) == []


async def test_what_cannot_work_is_refused_while_the_route_is_built(locks: DistributedLockManager) -> None:
    app = FastAPI()

    def route(template: Any) -> Callable[..., Any]:
        async def endpoint(
            user_id: int, held: Annotated[Any, Depends(lock(template, manager=locks))]
        ) -> None: ...

        return endpoint

    for template, why in (
        ("{user}", r"'user' is no parameter of .*endpoint; it has: user_id, held, region"),
        ("{held.name}", "'held' is the lock itself"),
        (lambda usr: usr, "'usr' is no parameter"),
        (lambda *rest: rest[0], r"FastAPI can't give it \*rest"),
        (lambda **rest: rest["user_id"], r"FastAPI can't give it \*\*rest"),
    ):
        with pytest.raises(InvalidArgument, match=why) as caught:
            app.get("/{region}/{user_id}")(route(template))
        assert caught.value.field == "template"
    for template in ("", "{a", "a}", "{}", "{0}", "{a b}", None, 7):
        with pytest.raises(InvalidArgument, match="template"):
            lock(template)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="the endpoint that it is for is not to be seen"):
        inspect.signature(lock("{user_id}"))


async def test_a_function_with_annotations_needs_no_endpoint(locks: DistributedLockManager) -> None:
    def key(user_id: int, order: Order, x_tenant: Annotated[str, Header()] = "none") -> str:
        return f"{x_tenant}:{user_id}:{order.customer}"

    assert {"user_id", "order", "x_tenant"} < set(inspect.signature(lock(key)).parameters)
    app = FastAPI()

    @app.post("/users/{user_id}", dependencies=[Depends(lock(key, manager=locks))])  # noqa: FAST003 - the lock's
    async def post() -> Any:
        return await names(locks)

    async with client_of(app) as client:
        answer = await client.post("/users/07", json={"customer": "ada"})
        assert answer.json() == ["none:7:ada"]
        answer = await client.post("/users/07", json={"customer": "ada"}, headers={"X-Tenant": "acme"})
        assert answer.json() == ["acme:7:ada"]


async def test_names_that_are_none(locks: DistributedLockManager) -> None:
    app = FastAPI()

    @app.get("/")
    async def get(key: str, held: Annotated[Any, Depends(lock("{key}", manager=locks))]) -> None:
        pytest.fail("it ran")

    async with client_of(app) as client:
        with pytest.raises(InvalidArgument, match="name"):
            await client.get("/?key=")


async def test_a_manager_that_lives_with_the_application(valkey_url: str, unique: str) -> None:
    manager = manager_at(valkey_url, unique)
    app = FastAPI(lifespan=lifespan(manager))

    @app.get("/{key}")
    async def get(key: str, held: Annotated[DistributedLock, Depends(lock("{key}"))]) -> str:
        return held.name

    async with client_of(app) as client:
        with pytest.raises(ConfigurationError, match="has no manager"):
            await client.get("/a")
        async with app.router.lifespan_context(app):
            assert (await client.get("/a")).json() == "a"
    assert manager._link.closed


async def test_a_manager_from_the_configuration(
    platform_env: dict[str, str], unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dotmac.platform.core.unified_config import reload_config

    monkeypatch.setenv("DISTRIBUTED_LOCKS_NAMESPACE", unique)
    reload_config()
    app = FastAPI(lifespan=lifespan())

    @app.get("/{key}")
    async def get(key: str, held: Annotated[DistributedLock, Depends(lock("{key}"))]) -> str:
        return held.name

    for _ in range(2):  # as often as the application starts
        async with app.router.lifespan_context(app), client_of(app) as client:
            assert (await client.get("/a")).json() == "a"


async def test_generators_under_with_lock_are_dependencies(locks: DistributedLockManager) -> None:
    @locks.with_lock("user:{user_id}")
    async def session(user_id: int) -> AsyncIterator[list[str]]:
        yield await names(locks)

    @locks.with_lock("blocking:{user_id}")
    def blocking(user_id: int) -> Iterator[list[str]]:
        yield sorted(info.name for info in locks.list_locks_sync())

    app = FastAPI()

    @app.get("/async/{user_id}")
    async def one(found: Annotated[list[str], Depends(session)]) -> list[str]:
        return found

    @app.get("/sync/{user_id}")
    async def other(found: Annotated[list[str], Depends(blocking)]) -> list[str]:
        return found

    async with client_of(app) as client:
        assert (await client.get("/async/07")).json() == ["user:7"]
        assert (await client.get("/sync/7")).json() == ["blocking:7"]
        assert (await client.get("/async/seven")).status_code == 422
    for path in app.openapi()["paths"].values():
        assert path["get"]["parameters"][0]["schema"]["type"] == "integer"
    assert await names(locks) == []
