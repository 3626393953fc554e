"""Any order of asking, waiting, nesting, extending, leaving and being cancelled, after any number of turns.

Promises: never two holders of one lock; who asked first is granted first, under a higher token than all
before; whoever is inside really holds; nested locks never hang, for waits that close a circle are refused;
and once all have left nothing is held, nobody waits, no request is known, and every lock is free at once.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle as Values
from hypothesis.stateful import (
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from dotmac.platform.errors import DeadlockDetected, LockTimeout
from support.locks import Partition, manager_at, until

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from dotmac.platform.distributed_locks import DistributedLock

NAMES = ("a", "b", "c")
TURNS = st.integers(0, 8)
LIMIT = 20.0


class Actor:
    """A task that acquires a lock, stays inside until it is told to leave, and may want another meanwhile."""

    def __init__(self, number: int, name: str) -> None:
        self.number, self.name = number, name
        self.leave = asyncio.Event()
        self.wanted: asyncio.Queue[str | None] = asyncio.Queue()
        self.lock: DistributedLock | None = None
        self.task: asyncio.Task[None]


class Locks(RuleBasedStateMachine):
    """The locks of one namespace and the tasks of one loop."""

    url = ""
    actors = Values("actors")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        namespace = f"t{secrets.token_hex(6)}"
        self.manager = manager_at(self.url, namespace)
        self.partition = Partition(self.url, namespace)
        self.everyone: list[Actor] = []
        self.inside: dict[str, Actor | None] = dict.fromkeys(NAMES)
        self.tokens = dict.fromkeys(NAMES, 0)
        self.latest = dict.fromkeys(NAMES, -1)
        self.run(self.manager.list_locks())  # connected, so that requests go out in the order of their making

    def run(self, work: Coroutine[None, None, object]) -> None:
        self.loop.run_until_complete(asyncio.wait_for(work, LIMIT))

    def go_on(self, turns: int) -> None:
        async def turn() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.run(turn())

    # ---- what may happen

    @rule(
        target=actors,
        name=st.sampled_from(NAMES),
        patience=st.sampled_from([None, None, None, 0.0, 0.005, 5.0]),
        by_hand=st.booleans(),
        turns=TURNS,
    )
    def ask(self, name: str, patience: float | None, by_hand: bool, turns: int) -> Actor:
        actor = Actor(len(self.everyone), name)
        self.everyone.append(actor)
        actor.task = self.loop.create_task(self.live(actor, patience, by_hand))
        self.go_on(turns)
        return actor

    @rule(actor=actors, name=st.sampled_from(NAMES), turns=TURNS)
    def want_another(self, actor: Actor, name: str, turns: int) -> None:
        actor.wanted.put_nowait(name)
        self.go_on(turns)

    @rule(actor=actors, turns=TURNS)
    def leave(self, actor: Actor, turns: int) -> None:
        actor.wanted.put_nowait(None)
        self.go_on(turns)

    @rule(target=actors, actor=consumes(actors), turns=TURNS, again=st.booleans())
    def cancel(self, actor: Actor, turns: int, again: bool) -> object:
        actor.task.cancel()
        self.go_on(turns)
        return actor if again else multiple()

    @rule(milliseconds=st.integers(1, 6))
    def wait(self, milliseconds: int) -> None:
        self.run(asyncio.sleep(milliseconds / 1000))

    @rule()
    def flush_scripts(self) -> None:
        self.partition.client.script_flush()

    # ---- what each task does

    async def live(self, actor: Actor, patience: float | None, by_hand: bool) -> None:
        actor.lock = lock = self.manager.acquire_lock(actor.name, blocking_timeout=patience)
        with suppress(LockTimeout):
            if not by_hand:
                async with lock:
                    await self.stay(actor, actor.name, lock)
            elif await lock.acquire():
                try:
                    await self.stay(actor, actor.name, lock)
                finally:
                    try:
                        await lock.release()
                    except asyncio.CancelledError:
                        if lock.held:  # cancelled before the release began
                            await lock.release()
                        raise

    async def stay(self, actor: Actor, name: str, lock: DistributedLock) -> None:
        other = self.inside[name]
        assert other is None, f"{actor.number} entered {name!r} while {other and other.number} was inside"
        assert lock.held
        assert lock.fencing_token > self.tokens[name]
        self.tokens[name] = lock.fencing_token
        if name == actor.name:
            assert actor.number > self.latest[name], "it pushed in"
            self.latest[name] = actor.number
        self.inside[name] = actor
        try:
            while (wanted := await actor.wanted.get()) is not None:
                if wanted == name:
                    await lock.extend(30)
                    continue
                try:
                    async with self.manager.acquire_lock(wanted) as nested:
                        await self.pass_through(actor, wanted, nested)
                except DeadlockDetected:
                    pass
        finally:
            self.inside[name] = None

    async def pass_through(self, actor: Actor, name: str, lock: DistributedLock) -> None:
        """Inside a second lock, for some turns."""
        assert self.inside[name] is None
        assert lock.fencing_token > self.tokens[name]
        self.tokens[name] = lock.fencing_token
        self.inside[name] = actor
        try:
            for _ in range(3):
                await asyncio.sleep(0)
                assert lock.held
        finally:
            self.inside[name] = None

    # ---- what has to hold

    @invariant()
    def whoever_is_inside_holds(self) -> None:
        for name, actor in self.inside.items():
            if actor is not None and name == actor.name:
                assert actor.lock is not None
                assert actor.lock.remaining > 0

    @invariant()
    def nobody_failed(self) -> None:
        for actor in self.everyone:
            if actor.task.done() and not actor.task.cancelled():
                actor.task.result()

    def teardown(self) -> None:
        try:
            self.run(self.end())
        finally:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.run(self.manager.aclose())
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()
            self.partition.client.close()

    async def end(self) -> None:
        for actor in self.everyone:
            actor.wanted.put_nowait(None)
        if self.everyone:
            _, late = await asyncio.wait([actor.task for actor in self.everyone], timeout=LIMIT / 2)
            assert not late, f"still waiting: {[(actor.number, actor.name) for actor in self.everyone]}"
        self.nobody_failed()
        for name in NAMES:
            async with self.manager.acquire_lock(name, blocking_timeout=5):
                pass
        await until(self.partition.empty, 5)
        assert self.manager.stats()["held"] == 0


def test_any_order_of_anything(valkey_url: str) -> None:
    """`LOCK_EXAMPLES=1000` looks further, at other examples each time."""
    further = int(os.environ.get("LOCK_EXAMPLES", "0"))

    class Here(Locks):
        url = valkey_url

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=further or 40,
            stateful_step_count=40,
            derandomize=not further,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
