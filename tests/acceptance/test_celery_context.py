"""The audit context and Celery, with real workers of every pool.

Promises: a task's events are of who published it, in the pools prefork, threads and solo, in functions and in
coroutines; through retries, chains, and tasks that publish tasks; a task published outside of any context has
none but the correlation id of its chain, also where a task before it failed in the same process; a header
that makes no sense hurts nobody; eager tasks keep their caller's context.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery, chain
from celery.result import AsyncResult

from dotmac.platform.audit_trail.context import audit_context, current_audit_context
from dotmac.platform.contrib.celery import carry_audit_context
from dotmac.platform.contrib.celery.context import HEADER
from support.locks import TESTS

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT = 90
TASKS = "support.celery_context"


@pytest.fixture(scope="module", params=["prefork", "threads", "solo"])
def app(request: pytest.FixtureRequest, valkey_url: str, tmp_path_factory: Any) -> Iterator[Celery]:
    """A publisher, and a worker of one process or thread, so that tasks follow one another in it."""
    namespace = f"c{os.urandom(6).hex()}"
    log = tmp_path_factory.mktemp("celery") / "worker.log"
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [
                *(sys.executable, "-m", "celery", "-A", TASKS, "worker", "--pool", request.param),
                *("--concurrency", "1", "--loglevel", "INFO", "-n", f"w@{namespace}"),
                *("--without-mingle", "--without-gossip", "--without-heartbeat"),
            ],
            cwd=TESTS,
            env={**os.environ, "URL": valkey_url, "NAMESPACE": namespace, "C_FORCE_ROOT": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    carry_audit_context()
    made = Celery("tasks", broker=valkey_url, backend=valkey_url)
    made.conf.update(task_default_queue=namespace, broker_connection_retry_on_startup=True)
    yield made
    worker.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    made.close()
    print(log.read_text())


def ask(app: Celery, name: str, *arguments: Any, **options: Any) -> Any:
    return app.send_task(f"{TASKS}.{name}", arguments, **options).get(timeout=LIMIT)


ADA = {"user_id": "ada", "tenant_id": 7, "correlation_id": "c-1", "ip_address": "192.0.2.7"}
SEEN = {"user": "ada", "tenant": "7", "correlation": "c-1", "address": "192.0.2.7", "metadata": {"a": 1}}


def test_it_travels(app: Celery) -> None:
    with audit_context(**ADA, metadata={"a": 1}):
        plain = ask(app, "look")
        coroutine = ask(app, "look_in_a_coroutine", "x")
        retried = ask(app, "look_at_the_third_try")
        with pytest.raises(RuntimeError, match="on purpose"):
            ask(app, "fail")
    for found in (plain, coroutine, retried):
        assert found == {**found, **SEEN}
        assert found["pid"] != os.getpid()
    assert retried["retries"] == 2
    task = app.send_task(f"{TASKS}.look")
    found = task.get(timeout=LIMIT)
    nothing = {"user": None, "tenant": None, "correlation": task.id, "address": None, "metadata": {}}
    assert found == {**found, **nothing}, "nothing is left of the tasks before"


def test_chains_and_tasks_that_publish_tasks(app: Celery) -> None:
    steps = [app.signature(f"{TASKS}.collect", args=([],)), app.signature(f"{TASKS}.collect")]
    with audit_context(**ADA, metadata={"a": 1}):
        found = chain(*steps, app=app).apply_async().get(timeout=LIMIT)
        inner = ask(app, "publish", None)
        others = ask(app, "publish", "bob")
    assert [one["user"] for one in found] == ["ada", "ada"]
    assert AsyncResult(inner, app=app).get(timeout=LIMIT)["user"] == "ada"
    last = AsyncResult(others, app=app).get(timeout=LIMIT)
    assert [(one["user"], one["tenant"], one["correlation"]) for one in last] == [("bob", "7", "c-1")] * 2


@pytest.mark.parametrize("nonsense", [7, [1], {"user_id": 7, "ip_address": "x", "metadata": 3, "z": 1}])
def test_nonsense_in_the_header(app: Celery, nonsense: Any) -> None:
    found = ask(app, "look", headers={HEADER: nonsense})
    assert (found["user"], found["address"], found["metadata"]) == (None, None, {})


def test_what_cannot_travel_stays(app: Celery) -> None:
    for metadata in ({"x": object()}, {"x": "x" * 20_000}):
        with audit_context(user_id="ada", metadata=metadata):
            found = ask(app, "look")
        assert (found["user"], found["metadata"]) == ("ada", {})


def test_eager_tasks_keep_their_callers_context() -> None:
    carry_audit_context()
    app = Celery("eager", set_as_current=False)
    app.conf.task_always_eager = True

    @app.task
    def look() -> object:
        return current_audit_context().user_id

    with audit_context(user_id="ada"):
        assert look.delay().get() == "ada"
    assert look.delay().get() is None
