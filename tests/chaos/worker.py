"""A process that locks: tasks or threads that ask, hold, look, write, nest, extend, enter again, offer, are
cancelled, give back.

It writes down what it asked for and what it was made to believe (`history.py`), and judges nothing. It goes
on until its standard input ends, then ends what it has begun and closes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from chaos import register
from chaos.diary import Diary
from chaos.history import SECOND, Recorder
from chaos.kinds import KINDS
from chaos.limits import ANSWER
from chaos.plans import OFFERED, Plan, draw
from dotmac.platform.distributed_locks import DistributedLock
from dotmac.platform.distributed_locks.scopes import _of_thread
from dotmac.platform.errors import DeadlockDetected, LockLost, LockTimeout, ServerUnavailable
from support.locks import manager_at

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from chaos.diary import Held
    from chaos.plans import Group
    from dotmac.platform.distributed_locks import DistributedLockManager

LOOK = 0.04  # seconds between two looks of a holder
ADOPTING = 0.5  # how likely a task or thread looks for an offer before it asks for something itself
# Why entering a lock once more may fail: it is lost, and somebody else may have it.
ENDED = (LockLost, LockTimeout, DeadlockDetected, ServerUnavailable)


class Step(NamedTuple):
    """What a holder does next, in the way of tasks or of threads."""

    do: Literal["write", "sleep", "extend", "again", "deeper"]
    what: Any


@dataclass(slots=True)
class Setting:
    """What the process was told."""

    url: str
    namespace: str
    register: str
    offers: str
    log: str
    seed: str
    style: str
    lines: int
    groups: list[Group]
    timeouts: list[float]


class Worker:
    """What tasks and threads share."""

    def __init__(self, setting: Setting, record: Recorder) -> None:
        self.setting, self.record = setting, record
        self.locks: DistributedLockManager = manager_at(
            setting.url, setting.namespace, request_timeout=ANSWER / SECOND
        )
        self.numbers = count(1)
        self.offers = count(1)
        self.stopping = threading.Event()

    def make(self, plan: Plan, patience: float | None) -> Held:
        arguments = {
            "timeout": plan.timeout,
            "blocking_timeout": patience,
            "auto_renewal": not plan.fixed,
            "on_lost": plan.on_lost,
            "priority": plan.priority,
        }
        if len(plan.locks) > 1:
            return self.locks.acquire_locks(plan.locks, **arguments)  # type: ignore[arg-type]  # of several types
        return plan.kind.make(self.locks, plan.locks[0], **arguments)

    def plans(self, line: int) -> Iterator[tuple[random.Random, Plan, str | None]]:
        """What one task or thread does, until the process is to end; with the token of what it takes over."""
        chance = random.Random(f"{self.setting.seed}/{line}")
        while not self.stopping.is_set():
            plan = draw(chance, self.setting.groups, self.setting.timeouts)
            token = self.taken_offer(plan) if chance.random() < ADOPTING else None
            yield chance, plan, token

    def offer(self, plan: Plan, token: str) -> None:
        """Lays a token out for whoever finds it first, in this process or another."""
        place = Path(self.setting.offers)
        name = f"{os.getpid()}-{next(self.offers)}"
        (place / f"{name}.new").write_text(
            json.dumps({"kind": plan.kind.name, "lock": plan.locks[0], "token": token})
        )
        (place / f"{name}.new").rename(place / f"{name}.offer")

    def taken_offer(self, plan: Plan) -> str | None:
        """The token of an offer that nobody else takes; the plan is made to fit."""
        for offer in Path(self.setting.offers).glob("*.offer"):
            mine = offer.with_suffix(f".{os.getpid()}")
            try:
                offer.rename(mine)
            except FileNotFoundError:
                continue
            found = json.loads(mine.read_text())
            mine.unlink()
            plan.kind = next(kind for kind in KINDS if kind.name == found["kind"])
            plan.locks, plan.again, plan.offer, plan.deeper = (found["lock"],), False, False, None
            return str(found["token"])
        return None

    def body(self, diary: Diary, lock: Held, plan: Plan) -> Generator[Step, Any, None]:
        """What is done under a lock."""
        until = time.monotonic() + plan.hold
        while True:
            diary.look(lock)
            for name in plan.locks:
                if not (yield Step("write", (name, plan.kind.mode, diary.fences[name]))):
                    diary.look(lock)
                    return
                diary.look(lock)
            if plan.extend is not None and isinstance(lock, DistributedLock):
                diary.unsure()
                with suppress(ServerUnavailable):
                    yield Step("extend", (lock, plan.extend))
                plan.extend = None
                diary.look(lock)
            if plan.again:
                plan.again = False
                with suppress(*ENDED):
                    yield Step("again", (self.make(plan, 0.0), diary))
                diary.look(lock)
            if plan.deeper is not None:
                deeper, plan.deeper = plan.deeper, None
                yield Step("deeper", deeper)
                diary.look(lock)
            left = until - time.monotonic()
            if left <= 0:
                return
            yield Step("sleep", min(left, LOOK))

    def await_end(self) -> None:
        sys.stdin.read()
        self.stopping.set()


class Asynchronous(Worker):
    """Tasks of one event loop."""

    async def run(self) -> None:
        self.register = register.Client(self.setting.register)
        await self.register.open()
        async with self.locks:
            ending = asyncio.create_task(asyncio.to_thread(self.await_end))
            await asyncio.gather(*(self.line(number) for number in range(self.setting.lines)))
            await ending
        await self.register.close()

    async def line(self, number: int) -> None:
        for chance, plan, token in self.plans(number):
            task = asyncio.create_task(self.attempt(plan, token))
            match plan.cancel:
                case ("turns", turns):
                    for _ in range(int(turns)):
                        await asyncio.sleep(0)
                    task.cancel()
                case ("seconds", seconds):
                    await asyncio.wait({task}, timeout=seconds)
                    task.cancel()
            await asyncio.wait({task})
            await asyncio.sleep(chance.uniform(0, 0.03))

    async def attempt(self, plan: Plan, token: str | None = None) -> None:
        scope = f"{id(asyncio.current_task()):x}"
        diary = Diary(self.record, self.numbers, plan, scope, adopted=token is not None)
        how = "released"
        try:
            if token is not None or plan.by_hand or plan.offer:
                how = await self.by_hand(diary, plan, token)
            else:
                async with self.make(plan, plan.patience) as lock:
                    try:
                        diary.held(lock)
                        await self.follow(self.body(diary, lock, plan))
                    finally:
                        diary.leaving()
        except asyncio.CancelledError as error:
            how = diary.failed(error)
            raise
        except Exception as error:  # noqa: BLE001 - what nobody expects is written down
            how = diary.failed(error)
        finally:
            diary.end(how)

    async def by_hand(self, diary: Diary, plan: Plan, token: str | None) -> str:
        lock: Held
        if token is not None:
            lock = await self.locks.adopt(token, plan.timeout)
        else:
            lock = self.make(plan, plan.patience)
            if not await lock.acquire():
                return "timeout"
        offered = False
        try:
            diary.held(lock)
            await self.follow(self.body(diary, lock, plan))
            offered = plan.offer
        finally:
            diary.leaving()
            try:
                if offered and isinstance(lock, DistributedLock):
                    self.offer(plan, await lock.offer(OFFERED))
                else:
                    await lock.release()
            except asyncio.CancelledError:
                # Cancelled before it began; otherwise the engine sees to it.
                if lock.held:
                    await lock.release()
                raise
        return "offered" if offered else "released"

    async def follow(self, steps: Generator[Step, Any, None]) -> None:
        """Does one step after another, and answers or raises there."""
        step = next(steps, None)
        while step is not None:
            try:
                answer = await self.do(step)
            except ENDED as error:
                step = _thrown(steps, error)
            else:
                step = _sent(steps, answer)

    async def do(self, step: Step) -> Any:
        match step:
            case ("write", what):
                return await self.register.write(*what)
            case ("sleep", seconds):
                await asyncio.sleep(seconds)
            case ("extend", (lock, length)):
                await lock.extend(length)
            case ("again", (lock, diary)):
                async with lock:
                    diary.again(lock)
            case ("deeper", plan):
                await self.attempt(plan)
        return None


class Threads(Worker):
    """Threads without an event loop."""

    def run(self) -> None:
        with self.locks:
            threads = [
                threading.Thread(target=self.line, args=(number,)) for number in range(self.setting.lines)
            ]
            for thread in threads:
                thread.start()
            self.await_end()
            for thread in threads:
                thread.join()

    def line(self, number: int) -> None:
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(self.setting.register)
            with link.makefile("rb") as answers:
                for chance, plan, token in self.plans(number):
                    self.attempt(plan, link, answers, token)
                    time.sleep(chance.uniform(0, 0.03))

    def attempt(self, plan: Plan, link: socket.socket, answers: Any, token: str | None = None) -> None:
        diary = Diary(self.record, self.numbers, plan, thread_name(), adopted=token is not None)
        how = "released"
        try:
            if token is not None or plan.by_hand or plan.offer:
                how = self.by_hand(diary, plan, token, link, answers)
            else:
                with self.make(plan, plan.patience) as lock:
                    try:
                        diary.held(lock)
                        self.follow(self.body(diary, lock, plan), link, answers)
                    finally:
                        diary.leaving()
        except Exception as error:  # noqa: BLE001 - what nobody expects is written down
            how = diary.failed(error)
        finally:
            diary.end(how)

    def by_hand(self, diary: Diary, plan: Plan, token: str | None, link: socket.socket, answers: Any) -> str:
        lock: Held
        if token is not None:
            lock = self.locks.adopt_sync(token, plan.timeout)
        else:
            lock = self.make(plan, plan.patience)
            if not lock.acquire_sync():
                return "timeout"
        offered = False
        try:
            diary.held(lock)
            self.follow(self.body(diary, lock, plan), link, answers)
            offered = plan.offer
        finally:
            diary.leaving()
            if offered and isinstance(lock, DistributedLock):
                self.offer(plan, lock.offer_sync(OFFERED))
            else:
                lock.release_sync()
        return "offered" if offered else "released"

    def follow(self, steps: Generator[Step, Any, None], link: socket.socket, answers: Any) -> None:
        """Does one step after another, and answers or raises there."""
        step = next(steps, None)
        while step is not None:
            try:
                answer = self.do(step, link, answers)
            except ENDED as error:
                step = _thrown(steps, error)
            else:
                step = _sent(steps, answer)

    def do(self, step: Step, link: socket.socket, answers: Any) -> Any:
        match step:
            case ("write", what):
                link.sendall(register.ask(0, *what))
                return json.loads(answers.readline())["accepted"]
            case ("sleep", seconds):
                time.sleep(seconds)
            case ("extend", (lock, length)):
                lock.extend_sync(length)
            case ("again", (lock, diary)):
                with lock:
                    diary.again(lock)
            case ("deeper", plan):
                self.attempt(plan, link, answers)
        return None


def _sent(steps: Generator[Step, Any, None], answer: Any) -> Step | None:
    try:
        return steps.send(answer)
    except StopIteration:
        return None


def _thrown(steps: Generator[Step, Any, None], error: BaseException) -> Step | None:
    try:
        return steps.throw(error)
    except StopIteration:
        return None


def thread_name() -> str:
    """What the engine calls this thread."""
    return str(_of_thread())


def open_things() -> dict[str, int]:
    """What the process has open: descriptors by what they lead to, and threads."""
    found: Counter[str] = Counter()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that the list was read with
            found[str(descriptor.readlink()).partition(":[")[0]] += 1
    found["threads"] = sum(1 for _ in Path("/proc/self/task").iterdir())
    return dict(found)


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """What there is more of."""
    return {
        what: number - before.get(what, 0) for what, number in after.items() if number > before.get(what, 0)
    }


def main(text: str) -> None:
    setting = Setting(**json.loads(text))
    record = Recorder(Path(setting.log))
    record("begin", pid=os.getpid())
    before = open_things()
    if setting.style == "tasks":
        asyncio.run(Asynchronous(setting, record).run())
    else:
        Threads(setting, record).run()
    gc.collect()  # the traceback of a cancelled task refers to the task, and its frames to the bridge
    deadline = time.monotonic() + 5
    while (left := grown(before, open_things())) and time.monotonic() < deadline:
        threading.Event().wait(0.02)  # time.sleep fails under libfaketime
    if left:
        record("complaint", text=f"left open after it was closed: {left}")
    record("goodbye")


if __name__ == "__main__":
    main(sys.argv[1])
