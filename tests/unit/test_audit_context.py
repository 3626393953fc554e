"""The audit context.

Promises: blocks nest and merge, the inner word counts; functions are asked at each use; it works in `with`,
`async with` and as a decorator of functions, coroutine functions, generators of both kinds, whose signature,
name and kind stay; one object may be entered by many tasks at once, and again inside of itself; tasks and
`asyncio.to_thread` have it, a thread has it by `copy_context`, and nobody else's thread or task does; blocks
that end out of turn, or in another context than they began in, take only themselves away; wrong values are
refused where they are given.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import ipaddress
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from dotmac.platform.audit_trail.context import AuditContext, audit_context, current_audit_context
from dotmac.platform.audit_trail.privacy import Given, filled_in
from dotmac.platform.errors import InvalidArgument


def user():
    return current_audit_context().user_id


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert current_audit_context() == AuditContext()


def test_blocks_nest_and_merge():
    with audit_context(user_id="ada", tenant_id=7, metadata={"a": 1, "b": 1}):
        with audit_context(correlation_id="c", ip_address="10.0.0.1", metadata={"b": 2}) as block:
            assert current_audit_context() == AuditContext(
                user_id="ada",
                tenant_id=7,
                correlation_id="c",
                ip_address="10.0.0.1",
                metadata={"a": 1, "b": 2},
            )
            with block, audit_context(user_id="bob"):
                assert user() == "bob"
            assert user() == "ada"
            with audit_context(inherit=False, correlation_id="d"):
                assert current_audit_context() == AuditContext(correlation_id="d")
        assert current_audit_context().metadata == {"a": 1, "b": 1}


def test_functions_are_asked_at_each_use():
    who = ["ada", None, "bob"]
    with audit_context(user_id="outer"), audit_context(user_id=lambda: who[0]), audit_context(tenant_id="t"):
        assert [(user(), who.pop(0)) for _ in range(3)] == [("ada", "ada"), ("outer", None), ("bob", "bob")]
    with audit_context(user_id=lambda: 1.5), pytest.raises(InvalidArgument, match=r"user_id: 1\.5"):
        user()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"user_id": 1.5}, "user_id"),
        ({"tenant_id": True}, "tenant_id"),
        ({"correlation_id": b"x"}, "correlation_id"),
        ({"ip_address": "10.0.0.300"}, "ip_address"),
        ({"metadata": [1]}, "metadata"),
    ],
)
def test_wrong_values_are_refused_where_they_are_given(wrong, told):
    with pytest.raises(InvalidArgument, match=told):
        audit_context(**wrong)


def test_a_context_is_what_was_given_not_what_became_of_it():
    given = {"a": 1}
    with audit_context(metadata=given):
        given["a"] = 2
        assert current_audit_context().metadata == {"a": 1}


async def test_tasks_and_threads():
    block = audit_context(user_id="ada")

    async def inside(name, entered, leave):
        with audit_context(user_id=name), block if name == "same" else audit_context():
            entered.set()
            await leave.wait()
            return user()

    leave, entered = asyncio.Event(), [asyncio.Event() for _ in range(20)]
    names = [f"u{number}" if number % 2 else "same" for number in range(20)]
    tasks = [asyncio.create_task(inside(name, one, leave)) for name, one in zip(names, entered, strict=True)]
    for one in entered:
        await one.wait()
    assert user() is None
    leave.set()
    assert await asyncio.gather(*tasks) == ["ada" if name == "same" else name for name in names]

    async with block:
        assert await asyncio.create_task(asyncio.to_thread(user)) == "ada"
        found = []
        thread = threading.Thread(target=contextvars.copy_context().run, args=(lambda: found.append(user()),))
        thread.start()
        thread.join()
        assert found == ["ada"]
        with ThreadPoolExecutor(1) as threads:
            assert await asyncio.get_running_loop().run_in_executor(threads, user) is None


def test_decorated_functions_keep_what_they_are():
    @audit_context(user_id="job")
    def function(a: int, *, b: str = "x") -> str:
        """What it does."""
        return f"{a}{b}{user()}"

    @audit_context(user_id="job")
    async def coroutine(a: int) -> str:
        await asyncio.sleep(0)
        return f"{a}{user()}"

    assert (function(1), function.__name__, function.__doc__) == ("1xjob", "function", "What it does.")
    assert str(inspect.signature(function)) == "(a: 'int', *, b: 'str' = 'x') -> 'str'"
    assert inspect.iscoroutinefunction(coroutine)
    assert asyncio.run(coroutine(1)) == "1job"
    with pytest.raises(ValueError, match="on purpose"):
        audit_context(user_id="x")(lambda: (_ for _ in ()).throw(ValueError("on purpose")))().__next__()


def test_decorated_generators_have_it_while_they_run_only():
    log = []

    @audit_context(user_id="gen")
    def numbers():
        try:
            got = yield (1, user())
            log.append((got, user()))
            try:
                yield (2, user())
            except KeyError:
                log.append(("thrown", user()))
            yield (3, user())
            yield (4, user())
        finally:
            log.append(("closed", user()))
        return "unreached"

    assert inspect.isgeneratorfunction(numbers)
    running = numbers()
    assert next(running) == (1, "gen")
    assert user() is None
    with audit_context(user_id="caller"):
        assert running.send("sent") == (2, "gen")
        assert user() == "caller"
        assert running.throw(KeyError("k")) == (3, "gen")
    running.close()
    assert log == [("sent", "gen"), ("thrown", "gen"), ("closed", "gen")]

    @audit_context(user_id="gen")
    def short():
        yield 1
        return "result"

    def around():
        return (yield from short())

    running = around()
    assert next(running) == 1
    with pytest.raises(StopIteration) as ended:
        next(running)
    assert ended.value.value == "result"


async def test_decorated_asynchronous_generators():
    log = []

    @audit_context(user_id="agen")
    async def numbers():
        try:
            got = yield (1, user())
            log.append((got, user()))
            try:
                yield (2, user())
            except KeyError:
                log.append(("thrown", user()))
            await asyncio.sleep(0)
            yield (3, user())
            yield (4, user())
        finally:
            await asyncio.sleep(0)
            log.append(("closed", user()))

    assert inspect.isasyncgenfunction(numbers)
    running = numbers()
    assert await anext(running) == (1, "agen")
    assert user() is None
    assert await running.asend("sent") == (2, "agen")
    assert await running.athrow(KeyError("k")) == (3, "agen")
    # Closed by another task, in another context.
    await asyncio.create_task(running.aclose())
    assert log == [("sent", "agen"), ("thrown", "agen"), ("closed", "agen")]
    assert [number async for number, _ in numbers()] == [1, 2, 3, 4]


def test_blocks_that_end_out_of_turn_take_only_themselves_away():
    first, second = audit_context(user_id="ada"), audit_context(tenant_id="t", user_id="bob")
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert (user(), current_audit_context().tenant_id) == ("bob", "t")
    first.__exit__()
    assert user() == "bob"
    second.__exit__()
    contextvars.copy_context().run(second.__exit__)


def test_arguments_win():
    metadata = {"a": 1, "b": 1}
    with audit_context(
        user_id=7, tenant_id=uuid.UUID(int=1), correlation_id="c", ip_address="10.0.0.1", metadata=metadata
    ):
        filled = filled_in(Given("x", metadata={"b": 2}), current_audit_context())
        assert filled[:7] == ("x", 7, uuid.UUID(int=1), None, None, "10.0.0.1", "c")
        assert filled.metadata == {"a": 1, "b": 2}
        given = Given("x", "u", "t", "rt", "ri", ipaddress.ip_address("::1"), "d", {"a": 2, "b": 3})
        assert filled_in(given, current_audit_context()) == given
        own = filled_in(Given("x", metadata={"ip_address": "192.0.2.1"}), current_audit_context())
        assert own.ip_address is None, "metadata's address is the event's own"
        other = filled_in(Given("x", metadata={"ip_address": "unknown"}), current_audit_context())
        assert other.ip_address == "10.0.0.1"
        assert filled_in(Given("x", metadata=[1]), current_audit_context()).metadata == [1]
