"""Starts everything, lets the faults happen, and asks the checker:
`make chaos SECONDS=60 SEED=1 TOPOLOGY=cluster`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from chaos.checker import check, report
from chaos.faults import BY_TOPOLOGY, CLOCKS, SERVER, STANDALONE, Planned, schedule
from chaos.history import Recorder, load, now
from chaos.limits import LOSES_DATA, SERVER_BACK, TAKEOVER, TURN
from chaos.servers import servers_of
from support.clock import LIBRARY, MISSING, WallClock
from support.locks import TESTS, manager_at
from support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chaos.verdict import Verdict

PLACES = 6
LINES = 3  # tasks or threads in each worker
LAG = 0.1  # seconds; a turn of our own loop that is later than this says that the machine is overloaded
TICK = 0.05
LOOK = 0.2  # seconds between two looks at which server serves
SEEN_LATE = 1.0  # seconds that a takeover may be old when it is seen
MEASURED = 1.5  # seconds in which those who knew the data have come to an emptied server
SWEEP = 40.0  # seconds in which everything of dead processes has to be gone
SECOND = 1_000_000_000


def place_name(number: int) -> str:
    return f"worker-{number:02}"


class Place:
    """Where one worker runs after another."""

    def __init__(self, run: Run, number: int, url: str) -> None:
        self._run, self.name = run, place_name(number)
        self._number = number
        self.proxy = Proxy(url) if number % 4 and run.servers.proxied else None
        self.url = url
        # The loader's clock slows Python down, so not for all.
        self.clock = WallClock(run.directory / f"{self.name}.clock") if number % 3 == 1 else None
        self._incarnations = count()
        self.process: subprocess.Popen[bytes] | None = None
        self.current = ""

    def start(self) -> None:
        """Starts the next worker here."""
        incarnation = next(self._incarnations)
        self.current = f"{self.name}-{incarnation}"
        setting = {
            "url": self.url if self.proxy is None else self.proxy.url,
            "namespace": self._run.namespace + (self.name if self._run.apart else ""),
            "register": str(self._run.directory / "register.sock"),
            "offers": str(self._run.directory / "offers"),
            "log": str(self._run.directory / f"{self.current}.jsonl"),
            "seed": f"{self._run.seed}/{self.current}",
            "style": "threads" if self._number % 3 == 2 else "tasks",
            "lines": LINES,
            "groups": self._run.servers.groups(),
            "timeouts": self._run.servers.timeouts,
        }
        environment = {} if self.clock is None else self.clock.environment
        with (self._run.directory / f"{self.current}.err").open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "always::ResourceWarning", "-m", "chaos.worker", json.dumps(setting)],
                stdin=subprocess.PIPE,
                stdout=errors,
                stderr=errors,
                env=self._run.environment | environment,
            )

    def kill(self) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()


class Run:
    """One run.

    Args:
        directory: where all files go.
        seed: decides what goes wrong, and what each worker does.
        seconds: how long things go wrong.
        say: takes a line about what happens.
        faulty: False for a run in which nothing goes wrong.
        apart: each worker has locks of its own, so that nothing is excluded and the checker has to say so.
        topology: what the servers are to one another.
    """

    def __init__(
        self,
        directory: Path,
        seed: int,
        seconds: float,
        *,
        say: Any = print,
        faulty: bool = True,
        apart: bool = False,
        topology: str = STANDALONE,
    ) -> None:
        self.directory, self.seed, self.seconds, self.say, self.apart = directory, seed, seconds, say, apart
        self.namespace = f"chaos{seed}"
        self.environment = {**os.environ, "PYTHONPATH": TESTS, "CHAOS_RUN": str(directory)}
        self.record = Recorder(directory / "run.jsonl")
        self.topology = topology
        self.servers = servers_of(topology, self.namespace, seed, directory)
        places = [place_name(number) for number in range(PLACES)]
        self._faults = schedule(seed, seconds, places, topology) if faulty else []
        self._numbers = count()
        self._chance = random.Random(seed)

    async def run(self) -> Verdict:
        """Everything, from the first start to the verdict."""
        self.say(
            f"{self.topology}, seed {self.seed}, {self.seconds:g} s, {PLACES} processes, "
            f"files in {self.directory}"
        )
        (self.directory / "offers").mkdir()
        if LIBRARY is None:
            self.say(f"the clocks are left alone: {MISSING}")
        with ExitStack() as stack:
            stack.enter_context(self.servers)
            register = self._start_register(stack)
            self.places = [Place(self, number, self.servers.url) for number in range(PLACES)]
            for place in self.places:
                if place.proxy is not None:
                    stack.enter_context(place.proxy)
                stack.callback(self._end_at_last, place)
                place.start()
            watching = [
                asyncio.create_task(watch) for watch in (self._watch_the_machine(), self._watch_takeovers())
            ]
            try:
                await self._storm()
                self.record("calm")
                await self._end_workers()
                await self._expect_nothing_left()
            finally:
                for watch in watching:
                    watch.cancel()
            assert register.stdin is not None
            register.stdin.close()
            register.wait(10)
        self._expect_no_process()
        history = load(self.directory)
        verdict = check(history)
        self.say(report(history, verdict))
        return verdict

    # ---- what goes wrong

    async def _storm(self) -> None:
        while not all((self.directory / f"{place.current}.jsonl").exists() for place in self.places):
            await asyncio.sleep(0.05)
        lanes: dict[str, list[Planned]] = {}
        for fault in self._faults:
            lanes.setdefault(fault.lane, []).append(fault)
        start = time.monotonic()
        await asyncio.gather(*(self._lane(lane, start) for lane in lanes.values()))
        await asyncio.sleep(max(0.0, start + self.seconds - time.monotonic()))
        self.servers.clock(0)

    async def _lane(self, faults: list[Planned], start: float) -> None:
        for fault in faults:
            await asyncio.sleep(max(0.0, start + fault.at - time.monotonic()))
            if fault.kind in CLOCKS and LIBRARY is None:
                continue
            if fault.kind in LOSES_DATA:
                # Tokens start anew from the server's clock, so those of one that is set back would be lower.
                self.servers.clock(0)
            number = next(self._numbers)
            self.record(
                "fault",
                number=number,
                kind=fault.kind,
                target=fault.lane,
                amount=fault.amount,
                wall=time.time_ns() // 1000,
            )
            self.say(str(fault))
            if fault.lane == SERVER:
                await self._break_server(fault)
            else:
                await self._break_worker(
                    next(place for place in self.places if place.name == fault.lane), fault
                )
            self.record("mended", number=number)
            if fault.kind in LOSES_DATA:
                await self._measure_grace(number)
            if fault.lane == SERVER and self.servers.unfinished:
                number = next(self._numbers)
                self.record("fault", number=number, kind=SERVER_BACK, target=SERVER)
                await self.servers.finish()
                self.record("mended", number=number)

    async def _break_server(self, fault: Planned) -> None:
        if fault.kind != "worker clock":
            await self.servers.do(fault)
            return
        for place in self.places:
            if place.clock is not None:
                place.clock.step(int(fault.amount))

    async def _measure_grace(self, number: int) -> None:
        """For how long the emptied server grants nothing. Those who knew the data may come after a newcomer,
        and make it longer."""
        length, end = 0, time.monotonic() + MEASURED
        while time.monotonic() < end:
            length = max(length, await asyncio.to_thread(self.servers.grace))
            await asyncio.sleep(TICK)
        self.record("grace", number=number, length=length)

    async def _break_worker(self, place: Place, fault: Planned) -> None:
        process, proxy = place.process, place.proxy
        assert process is not None
        match fault.kind:
            case "stopped":
                process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(fault.amount)
                process.send_signal(signal.SIGCONT)
            case "killed":
                self.record("killed", worker=place.current)
                await asyncio.to_thread(place.kill)
                await asyncio.sleep(fault.amount)
                place.start()
            case _ if proxy is None:
                pass  # this one has no proxy: nothing happens to it
            case "cut":
                proxy.drop()
            case "answer cut":
                proxy.cut_reply_to(b"EVALSHA")
                await asyncio.to_thread(proxy.cut.wait, 2)
                proxy.disarm()
            case "answer halved":
                proxy.halve_answer(fault.amount)
                await asyncio.sleep(1)
                proxy.disarm()
                await asyncio.sleep(fault.amount)
            case "answer half cut":
                proxy.halve_answer(5)
                await asyncio.sleep(1)
                proxy.disarm()
                proxy.drop()
            case "stalled":
                proxy.stall()
                await asyncio.sleep(fault.amount)
                proxy.flow()
            case "delayed":
                proxy.delay(0.05 + self._chance.random() * 0.3)
                await asyncio.sleep(fault.amount)
                proxy.delay(0)

    async def _watch_the_machine(self) -> None:
        """Notes when this loop itself runs late: then so may every other."""
        while True:
            before = now()
            await asyncio.sleep(TICK)
            late = now() - before - int(TICK * SECOND)
            if late > LAG * SECOND:
                self.record("fault", before, number=-1, kind="overload", target="machine", until=now())

    async def _watch_takeovers(self) -> None:
        """Notes when another server has come to serve: it gives out tokens above all that were given out
        before."""
        serving = await asyncio.to_thread(self.servers.serving)
        while serving is not None:
            await asyncio.sleep(LOOK)
            found = await asyncio.to_thread(self.servers.serving)
            if found is not None and found != serving:
                serving, before = found, now() - int(SEEN_LATE * SECOND)
                wall = time.time_ns() // 1000 - int(SEEN_LATE * 1_000_000)
                facts = {"kind": TAKEOVER, "target": SERVER, "until": now(), "wall": wall}
                self.record("fault", before, number=-1, **facts)

    # ---- the end

    async def _end_workers(self) -> None:
        deadline = time.monotonic() + TURN / SECOND + 15
        for place in self.places:
            assert place.process is not None
            assert place.process.stdin is not None
            place.process.stdin.close()
        for place in self.places:
            assert place.process is not None
            while place.process.poll() is None and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
            self.record("exit", worker=place.current, status=place.process.poll())
        for file in sorted(self.directory.glob("worker-*.err")):
            for line in file.read_text(errors="replace").splitlines():
                if not line.startswith(SAID_OF_LOSSES):
                    self.record("complaint", text=f"{file.stem}: {line}")

    async def _expect_nothing_left(self) -> None:
        """A living session sweeps what dead ones held; then only the partition's own counters are left."""
        async with manager_at(self.servers.url, self.namespace) as locks:
            await locks.list_locks()
            deadline = time.monotonic() + SWEEP
            while (left := self._left()) and time.monotonic() < deadline:
                await asyncio.sleep(0.2)
        for text in left or self._left():
            self.record("complaint", text=f"left on the server: {text}")
        if self.topology == STANDALONE:  # elsewhere the servers have connections to each other
            (admin,) = self.servers.primaries()
            if clients := len(admin.client_list()) - 1:
                self.record("complaint", text=f"{clients} connections are left on the server")

    def _left(self) -> list[str]:
        """What the server has beside the counters of the partition and one session, that of whoever looks."""
        return [text for client in self.servers.primaries() for text in self._left_at(client)]

    def _left_at(self, client: Any) -> list[str]:
        found = []
        for key in client.scan_iter(match=f"{{{self.namespace}:*", count=1000):
            # What a dead process noted of its waits goes when somebody notes something after half a minute.
            if key.endswith((":m", ":nw", ":nt")):
                continue
            if client.type(key) == "hash":
                entries: dict[str, Any] = client.hgetall(key)
            else:
                entries = dict(client.zrange(key, 0, -1, withscores=True))
            sessions = f"{key.rpartition(':')[0]}:s"
            found += [
                f"{key} {name!r}: {value!r}"
                for name, value in entries.items()
                if not self._is_own(client, sessions, name)
            ]
        return found

    def _is_own(self, client: Any, sessions: str, name: str) -> bool:
        """Whether an entry belongs to a session of this process."""
        session = name.lstrip("@!")
        who = client.hget(sessions, f"@{session}")
        return who is not None and json.loads(who).get("pid") == os.getpid()

    def _expect_no_process(self) -> None:
        for process in psutil.process_iter(["pid", "cmdline"]):
            try:
                ours = process.environ().get("CHAOS_RUN") == str(self.directory)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                self.record("complaint", text=f"process {process.pid} is left: {process.info['cmdline']}")
                process.kill()

    def _start_register(self, stack: ExitStack) -> subprocess.Popen[bytes]:
        process = stack.enter_context(
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "chaos.register",
                    str(self.directory / "register.sock"),
                    str(self.directory / "register.jsonl"),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self.environment,
            )
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    def _end_at_last(self, place: Place) -> None:
        """Whatever happened, no process of ours goes on."""
        if place.process is not None and place.process.poll() is None:
            place.process.kill()
            place.process.wait()


SAID_OF_LOSSES = ("lock lost", "release not confirmed")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long things go wrong")
    parser.add_argument("--seed", type=int, default=None, help="what goes wrong; printed, to be used again")
    parser.add_argument(
        "--topology",
        choices=list(BY_TOPOLOGY),
        default=STANDALONE,
        help="what the servers are to one another",
    )
    parser.add_argument("--directory", type=Path, default=None, help="where the files go; kept")
    chosen = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1_000_000) if chosen.seed is None else chosen.seed
    directory = chosen.directory or Path(tempfile.mkdtemp(prefix="chaos-"))
    directory.mkdir(parents=True, exist_ok=True)
    run = Run(directory, seed, chosen.seconds, topology=chosen.topology)
    verdict = asyncio.run(run.run())
    if not verdict.violations and chosen.directory is None:
        shutil.rmtree(directory)
    else:
        again = f"SECONDS={chosen.seconds:g} SEED={seed} TOPOLOGY={chosen.topology}"
        print(f"files are in {directory}; `make chaos {again}` does it again")
    return 1 if verdict.violations else 0


if __name__ == "__main__":
    sys.exit(main())
