"""The examples, as whole processes.

Promises: the FastAPI application registers itself, serves, audits reads and changes, keeps concurrent updates
of one user apart across processes, and deregisters and ends in order when it is stopped; a decorated endpoint
has the OpenAPI document of the bare one; the `on_event` variant does the same under FastAPI's deprecation
warning and no other; two services find each other by name and are told when there is nobody; a Celery prefork
worker runs an `async def` task under a lock to its end, one at a time across its processes, and audits it;
the ledger refuses the write of a holder that was stopped for longer than its lease, and keeps that of its
successor; the shop shows, exports and erases a customer's data.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.cli.demo.processes import Server, serve, until
from dotmac.platform.distributed_locks import DistributedLockManager
from dotmac.platform.service_registry import ServiceRegistry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

EXAMPLES = Path(__file__).parents[2] / "examples"
ME = {"username": "ada", "password": "correct horse"}


@pytest.fixture
async def audit(postgres_database: str) -> AsyncIterator[AuditAggregator]:
    async with AuditAggregator(postgres_url=postgres_database) as aggregator:
        await aggregator.migrate()
        yield aggregator


@pytest.fixture
async def registry(clean_valkey: str) -> AsyncIterator[ServiceRegistry]:
    async with ServiceRegistry(redis_url=clean_valkey) as opened:
        yield opened


@pytest.fixture
def env(clean_valkey: str, postgres_database: str) -> dict[str, str]:
    return {**os.environ, "APP_NAME": "users", "REDIS_URL": clean_valkey, "DATABASE_URL": postgres_database}


@contextlib.contextmanager
def running(example: str, env: dict[str, str], logs: Path, count: int = 1) -> Iterator[list[Server]]:
    """Processes of an example; what they wrote is shown where the test fails."""
    folder, app = example.split("/")
    directory = EXAMPLES / folder
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(serve(app, logs / f"{app.split(':')[0]}-{number}.log", env, directory))
            for number in range(count)
        ]
        try:
            yield servers
        except BaseException:
            for server in servers:
                print(server.log.read_text())
            raise


def stop_in_order(server: Server) -> None:
    """uvicorn ends by the signal that it was sent, once the application has shut down."""
    assert server.stop() in {0, -signal.SIGTERM}
    written = server.log.read_text()
    assert "Application shutdown complete." in written
    assert "Traceback" not in written


async def registered(registry: ServiceRegistry, name: str, count: int) -> None:
    async def there() -> bool:
        return len(await registry.discover_services(name)) == count

    await until(there, f"{count} instances of {name}")


async def test_fastapi_application(
    env: dict[str, str], tmp_path: Path, registry: ServiceRegistry, audit: AuditAggregator
) -> None:
    with running("fastapi_app/app:app", env, tmp_path, count=2) as servers:
        await registered(registry, "users", 2)
        found = await registry.discover_services("users")
        assert {instance.port for instance in found} == {server.port for server in servers}
        assert {instance.metadata["pid"] for instance in found} == {server.process.pid for server in servers}
        async with httpx.AsyncClient(timeout=30) as client:
            first, second = (server.url for server in servers)
            health = (await client.get(f"{first}/health")).json()
            assert health == {"status": "ok", "service": "users", "pid": servers[0].process.pid}
            assert (await client.post(f"{first}/users", json=ME)).status_code == 201
            assert (await client.post(f"{second}/users", json=ME)).status_code == 409
            wrong = await client.post(f"{first}/login", json=ME | {"password": "guess"})
            unknown = await client.post(f"{first}/login", json=ME | {"username": "eve"})
            assert (wrong.status_code, unknown.status_code) == (401, 401)
            token = (await client.post(f"{first}/login", json=ME)).raise_for_status().json()["token"]
            client.headers["Authorization"] = f"Bearer {token}"
            answers = await asyncio.gather(
                *(client.put(f"{(first, second)[n % 2]}/users/ada", json={f"field{n}": n}) for n in range(20))
            )
            assert [answer.status_code for answer in answers] == [200] * 20
            profile = (await client.get(f"{second}/users/ada")).json()["profile"]
            assert profile == {"changes": 20, **{f"field{n}": n for n in range(20)}}
            assert (await client.get(f"{second}/users/nobody")).status_code == 404
            stranger = await client.get(f"{second}/users/ada", headers={"Authorization": "Bearer x"})
            assert stranger.status_code == 401
        for server in servers:
            stop_in_order(server)
        assert await registry.list_services() == {}
    logins = await audit.query_events(categories=["AUTHENTICATION"], order="asc")
    assert [(event.user_id, event.outcome.name, event.ip_address) for event in logins] == [
        ("ada", "FAILURE", "127.0.0.1"),
        ("eve", "FAILURE", "127.0.0.1"),
        ("ada", "SUCCESS", "127.0.0.1"),
    ]
    assert await audit.count_events(actions=["user.update"], user_id="ada", resource_id="ada") == 20
    assert await audit.count_events(categories=["DATA_ACCESS"], user_id="ada") == 2


async def test_on_event_variant(
    env: dict[str, str], tmp_path: Path, registry: ServiceRegistry, audit: AuditAggregator
) -> None:
    with running("fastapi_app/on_event:app", env | {"PYTHONWARNINGS": "default"}, tmp_path) as [server]:
        await registered(registry, "users", 1)
        async with httpx.AsyncClient(timeout=30) as client:
            stored = await client.put(f"{server.url}/notes/a", json={"text": "hello"})
            assert stored.json() == {"text": "hello"}
        stop_in_order(server)
        assert await registry.list_services() == {}
        warned = [line for line in server.log.read_text().splitlines() if "Warning: " in line]
        ours = [line for line in warned if "dotmac" in line or "examples" in line]
        assert ours, "FastAPI no longer warns: the example may lose its remark"
        assert all("DeprecationWarning" in line for line in ours)
    assert await audit.count_events(actions=["note.update"], resource_id="a") == 1


def test_openapi_of_a_decorated_endpoint(env: dict[str, str]) -> None:
    """In a process of its own, since the application reads the environment when it is imported."""
    code = """
import inspect, sys
sys.path.insert(0, sys.argv[1])
import fastapi
import app
bare = fastapi.FastAPI(title="Users")
bare.put("/users/{user_id}")(inspect.unwrap(app.update_user))
path = "/users/{user_id}"
assert app.app.openapi()["paths"][path]["put"] == bare.openapi()["paths"][path]["put"]
assert inspect.signature(app.update_user) == inspect.signature(inspect.unwrap(app.update_user))
assert app.update_user is not inspect.unwrap(app.update_user)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(EXAMPLES / "fastapi_app")],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


async def test_microservices(env: dict[str, str], tmp_path: Path, registry: ServiceRegistry) -> None:
    with running("microservices/orders:app", env, tmp_path) as [orders]:
        await registered(registry, "orders", 1)
        async with httpx.AsyncClient(base_url=orders.url, timeout=30) as client:
            assert (await client.post("/orders/pear")).status_code == 503
            with running("microservices/stock:app", env, tmp_path) as [stock]:
                await registered(registry, "stock", 1)

                async def found() -> bool:
                    return (await client.get("/available/pear")).status_code == 200

                await until(found, "orders finds stock")
                answers = await asyncio.gather(*(client.post("/orders/pear") for _ in range(5)))
                assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 409, 409]
                assert (await client.get("/available/pear")).json() == {"available": False}
                stop_in_order(stock)

            async def gone() -> bool:
                return (await client.get("/available/pear")).status_code == 503

            await until(gone, "orders sees that stock left")
            assert (await client.post("/orders/pear")).status_code == 503
        stop_in_order(orders)


def test_fencing(env: dict[str, str]) -> None:
    def ledger(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "ledger.py", *arguments],
            cwd=EXAMPLES / "fencing",
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with ledger("ada", "100", "--think", "5") as slow:
        assert slow.stdout is not None
        read = slow.stdout.readline()
        assert "read 0 with token" in read, slow.stderr
        slow.send_signal(signal.SIGSTOP)
        try:
            with ledger("ada", "5") as quick:
                out, err = quick.communicate(timeout=60)
        finally:
            slow.send_signal(signal.SIGCONT)
        assert (quick.returncode, err) == (0, "")
        first, last = out.splitlines()
        assert int(first.rpartition(" ")[2]) > int(read.rpartition(" ")[2])
        assert last == f"{quick.pid} wrote 5"
        out, err = slow.communicate(timeout=60)
    assert (slow.returncode, out) == (1, "")
    assert f"{slow.pid} refused: a later holder of the lock has been here" in err
    with ledger("ada", "1") as after:
        out, err = after.communicate(timeout=60)
    assert "wrote 6" in out, err


def test_personal_data(env: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "personal_data" / "shop.py"), "ada"],
        env=env | {"AUDIT_TRAIL_PERSONAL_KEY": "0f" * 32},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    london, turin, exported, erased, *after = done.stdout.splitlines()
    assert "by support-7 token: *** data:" in london
    assert "'city': 'London'" in london
    assert "'city': 'Turin'" in turin
    assert exported == "2 events in ada.html"
    assert "Turin" in (tmp_path / "ada.html").read_text()
    assert "erased: 4 fields of 2 events" in erased
    assert after == ["customer.update by support-7 token: *** data: erased"] * 2


@pytest.fixture
def celery_worker(env: dict[str, str], tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    log = tmp_path / "celery.log"
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [
                *(sys.executable, "-m", "celery", "-A", "tasks", "worker"),
                *("--pool", "prefork", "--concurrency", "2", "--loglevel", "INFO"),
            ],
            cwd=EXAMPLES / "celery_worker",
            env={**env, "C_FORCE_ROOT": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield worker
    finally:
        children = psutil.Process(worker.pid).children(recursive=True) if worker.poll() is None else []
        if worker.poll() is None:
            worker.send_signal(signal.SIGTERM)
        try:
            worker.wait(30)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        for child in psutil.wait_procs(children, timeout=5)[1]:
            child.kill()
        print(log.read_text())


async def test_celery_worker(
    env: dict[str, str], celery_worker: subprocess.Popen[bytes], audit: AuditAggregator
) -> None:
    results: list[dict[str, Any]] = await asyncio.to_thread(ask_for_reports, env)
    pids = {result["pid"] for result in results}
    assert len(pids) == 2, "both children of the worker took part"
    assert celery_worker.pid not in pids
    phases = await audit.query_events(categories=["SYSTEM_TASK"], actions=["report.generate"], order="asc")
    assert [event.metadata["phase"] for event in phases] == ["started", "finished"] * len(results)
    for begin, end in zip(phases[::2], phases[1::2], strict=True):
        assert begin.metadata["pid"] == end.metadata["pid"], "two reports were generated at once"
        assert begin.resource_id == end.resource_id
    assert {str(event.id) for event in phases[::2]} == {result["event"] for result in results}
    async with DistributedLockManager(redis_url=env["REDIS_URL"]) as locks:
        assert await locks.list_locks() == []
    celery_worker.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert await asyncio.to_thread(celery_worker.wait, 30) == 0
    assert time.monotonic() - started < 15, "the worker's children end without being forced"


def ask_for_reports(env: dict[str, str]) -> list[dict[str, Any]]:
    """From a third process, as a web application would."""
    code = """
import json
from tasks import generate_monthly_report, remove_old_reports
results = [generate_monthly_report.delay(f"2026-{month:02}") for month in range(1, 9)]
plain = remove_old_reports.delay(3)
print(json.dumps([result.get(timeout=60) for result in results]))
assert plain.get(timeout=60) == 3
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=EXAMPLES / "celery_worker",
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found
