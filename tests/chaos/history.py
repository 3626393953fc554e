"""What the processes of a run write down, and reading it back.

Each process appends to a file of its own, one JSON object per line and per system call, so that a killed one
loses nothing but the line that it was in. Stamps are nanoseconds of one clock that all processes of the
machine share and that nobody steps: the engine's own.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from chaos.timeline import Timeline

if TYPE_CHECKING:
    from pathlib import Path

SECOND = 1_000_000_000
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now() -> int:
    """Nanoseconds since the machine started."""
    return time.clock_gettime_ns(_CLOCK)


class Recorder:
    """Appends events to a file."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __call__(self, event: str, at: int | None = None, **facts: Any) -> None:
        """Writes an event down; it happened `at`, or now."""
        line = json.dumps({"at": now() if at is None else at, "event": event, **facts})
        os.write(self._file, line.encode() + b"\n")

    def close(self) -> None:
        os.close(self._file)


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a file. A process that was killed may have left half a line at its end."""
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()
    events = [json.loads(line) for line in lines]
    if torn:
        events.append({"at": events[-1]["at"] if events else 0, "event": "torn"})
    return events


@dataclass(slots=True)
class Attempt:
    """One request for a lock, and what its owner believed until it was over. Times are stamps.

    Args:
        worker: the process that asked.
        number: of the request in that process.
        lock: the lock's name.
        kind: what was asked for.
        cost, capacity: how much of the lock it takes, and how much there is.
        timeout: length of the lease.
        fixed: the lease is not renewed.
        patience: how long it would wait; None without end.
        asked: just before it asked.
        held: just after it was told that it holds.
        fence: its token.
        acted: the last moment of which is known that the holder believed to hold.
        promised: until when it had been told that it may go on believing; no later than when it gave up or
            was told of a loss.
        left: just before it began to give back.
        lost: when it was told that it was lost, and why.
        ended, how: when and how the request was over; None if it never was.
        priority: higher ones go first.
        scope: the task or thread that asked, as the engine names it within the process.
        place, of: which of several locks that were asked for together it is, and how many these are.
        adopted: it was taken over from a holder who had offered it, under the same token.
        edges: of the cycle for which it was refused: lock, waiter, the waiter's process, holder.
    """

    worker: str
    number: int
    lock: str
    kind: str
    cost: int
    capacity: int
    timeout: int
    fixed: bool
    patience: int | None
    asked: int
    held: int | None = None
    fence: int | None = None
    acted: int = 0
    promised: int = 0
    left: int | None = None
    lost: tuple[int, str] | None = None
    ended: int | None = None
    how: str = ""
    priority: int = 0
    scope: str = ""
    place: int = 0
    of: int = 1
    adopted: bool = False
    edges: list[tuple[str, str, int, str]] = field(default_factory=list)

    def __str__(self) -> str:
        token = f", token {self.fence}" if self.fence else ""
        return f"{self.worker}#{self.number} ({self.kind} {self.lock!r}{token})"


@dataclass(slots=True)
class Write:
    """One write that the register answered, in the order of its answers."""

    at: int
    lock: str
    mode: str
    fence: int
    accepted: bool


@dataclass(slots=True)
class Fault:
    """Something that went wrong from `begin` to `end`: to a worker (by its place), the server or the
    machine.

    Args:
        wall: when it began by the wall clock, microseconds: fencing tokens that a server gives out after it
            lost data, or after it took over, are above that.
        grace: for how long the emptied server then granted nothing.
    """

    kind: str
    target: str
    begin: int
    end: int
    wall: int = 0
    grace: int = 0


@dataclass(slots=True)
class Process:
    """One worker: its place (a killed one has successors there) and how it ended."""

    name: str
    place: str
    pid: int = 0
    begun: int = 0
    killed: bool = False
    died: int | None = None
    said_goodbye: bool = False
    status: int | None = None


@dataclass
class History:
    """All that is known of a run. It does not change while it is judged."""

    attempts: list[Attempt] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    processes: dict[str, Process] = field(default_factory=dict)
    complaints: list[tuple[int, str]] = field(default_factory=list)
    calm: int | None = None
    end: int = 0

    @cached_property
    def timeline(self) -> Timeline:
        """The faults by target and time."""
        return Timeline(self.faults)

    def process(self, worker: str) -> Process:
        """A worker by its name, which is its place and a number; it may never have come to write anything."""
        return self.processes.setdefault(worker, Process(worker, worker.rpartition("-")[0]))


def load(directory: Path) -> History:
    """The history of a run from the files of its processes."""
    history = History()
    for path in sorted(directory.glob("worker-*.jsonl")):
        _worker(history, path.stem, read(path))
    register = directory / "register.jsonl"
    for event in read(register) if register.exists() else []:
        if event["event"] == "write":
            history.writes.append(
                Write(event["at"], event["lock"], event["mode"], event["fence"], event["accepted"])
            )
    _run(history, read(directory / "run.jsonl"))
    return history


def _worker(history: History, name: str, events: list[dict[str, Any]]) -> None:
    process = history.process(name)
    attempts: dict[int, Attempt] = {}
    for event in events:
        at = event["at"]
        history.end = max(history.end, at)
        match event["event"]:
            case "ask":
                number = event["number"]
                attempts[number] = Attempt(
                    worker=name,
                    number=number,
                    lock=event["lock"],
                    kind=event["kind"],
                    cost=event["cost"],
                    capacity=event["capacity"],
                    timeout=event["timeout"],
                    fixed=event["fixed"],
                    patience=event["patience"],
                    asked=at,
                    priority=event.get("priority", 0),
                    scope=event.get("scope", ""),
                    place=event.get("place", 0),
                    of=event.get("of", 1),
                    adopted=event.get("adopted", False),
                )
            case "begin":
                process.pid, process.begun = event["pid"], at
            case "complaint":
                history.complaints.append((at, f"{name}: {event['text']}"))
            case "goodbye":
                process.said_goodbye = True
            case kind if "number" in event:
                _follow(attempts[event["number"]], kind, at, event)
    history.attempts += attempts.values()


def _follow(attempt: Attempt, kind: str, at: int, event: dict[str, Any]) -> None:
    """What is known of an attempt after one more event."""
    match kind:
        case "held":
            attempt.held, attempt.fence = at, event["fence"]
            attempt.acted = attempt.promised = at
        case "seen":
            attempt.acted, attempt.promised = at, event["until"]
        case "unsure":
            # It asked for another length: how long it may believe is not known before the next look.
            attempt.promised = min(attempt.promised, at)
        case "leaving":
            attempt.left = at
            attempt.promised = min(attempt.promised, at)
        case "lost":
            attempt.lost = (at, event["reason"])
            attempt.promised = min(attempt.promised, at)
        case "deadlock":
            attempt.edges = [tuple(edge) for edge in event["edges"]]
        case "end":
            attempt.ended, attempt.how = at, event["how"]
            attempt.promised = min(attempt.promised, at)


def _run(history: History, events: list[dict[str, Any]]) -> None:
    open_faults: dict[int, Fault] = {}
    by_number: dict[int, Fault] = {}
    for event in events:
        at = event["at"]
        history.end = max(history.end, at)
        match event["event"]:
            case "fault":
                fault = Fault(event["kind"], event["target"], at, event.get("until", 0), event.get("wall", 0))
                history.faults.append(fault)
                if not fault.end:
                    open_faults[event["number"]] = by_number[event["number"]] = fault
            case "mended":
                open_faults.pop(event["number"]).end = at
            case "grace":
                by_number[event["number"]].grace = event["length"]
            case "killed":
                process = history.process(event["worker"])
                process.killed, process.died = True, at
            case "exit":
                history.process(event["worker"]).status = event["status"]
            case "calm":
                history.calm = at
            case "complaint":
                history.complaints.append((at, event["text"]))
    for fault in open_faults.values():
        fault.end = history.end
