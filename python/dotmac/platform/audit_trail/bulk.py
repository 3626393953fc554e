"""`log_events`: blocks of many events, one being made while the one before is on its way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail.entry import make_entry
from dotmac.platform.audit_trail.ids import uuid_of
from dotmac.platform.errors import InvalidEvent
from dotmac.platform.observability.tracing import trace_ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterable
    from uuid import UUID

    from dotmac.platform._native import AuditEntry
    from dotmac.platform.audit_trail.batch import Item
    from dotmac.platform.audit_trail.state import LoopState, Process

    Protect = Callable[[list[Any]], Awaitable[tuple[list[Any], Exception | None]]]
    Tell = Callable[[LoopState, AuditEntry, float, float], Awaitable[None]]
    Events = Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]]

__all__ = ["Bulk"]

BLOCK_EVENTS = 5_000
BLOCK_BYTES = 8 << 20
# So many events are made at a time, less than a millisecond: then the block before is fed to its socket.
_TAKEN = 100
_FIELDS = frozenset({
    "category", "action", "level", "outcome", "user_id", "tenant_id", "resource_type", "resource_id",
    "ip_address", "correlation_id", "metadata", "personal", "subject_id", "occurred_at", "id",
})  # fmt: skip


class Bulk:
    """One call of `log_events`.

    Args:
        tell: tells of an event that may be an anomaly, by a time of the loop.
        protect: fills in, redacts and seals events up to the first for which that can't be done.
        seconds: after a block is stored, within which a callback is waited for.
    """

    def __init__(
        self, process: Process, state: LoopState, seconds: float, tell: Tell, protect: Protect
    ) -> None:
        self._process = process
        self._state = state
        self._seconds = seconds
        self._tell = tell
        self._protect = protect
        self._ids: list[UUID] = []
        self._place = 0
        self._on_way: asyncio.Task[list[Item]] | None = None

    async def run(self, events: Events) -> list[UUID]:
        """Store them all; returns their ids."""
        block: list[AuditEntry] = []
        owns: list[bool] = []
        size = 0
        wrong: Exception | None = None
        try:
            async for items in _portions(events):
                given, unprotected = await self._protect(items)
                made, wrong = self._make(given)
                if wrong is None and unprotected is not None:
                    wrong = self._placed(unprotected)
                block += made
                owns += [item.get("id") is not None for item in items[: len(made)]]
                size += sum(entry.size for entry in made)
                if wrong is not None:
                    break
                if len(block) >= BLOCK_EVENTS or size >= BLOCK_BYTES:
                    await self._send(block, owns)
                    block, owns, size = [], [], 0
            if block:
                await self._send(block, owns)
            await self._settle()
        finally:
            if self._on_way is not None:
                # Not waited for: what is on its way is stored all the same, or its caller was told why not.
                self._on_way.add_done_callback(_look_at)
        if wrong is not None:
            raise wrong
        return self._ids

    def _make(self, items: list[Any]) -> tuple[list[AuditEntry], Exception | None]:
        """Events up to the first that is wrong, and what is wrong with that."""
        encoder, trace = self._process.encoder, trace_ids()
        made: list[AuditEntry] = []
        while True:
            made += encoder.entries(trace, items, len(made))
            if len(made) == len(items):
                break
            try:
                made.append(self._make_one(items[len(made)]))
            except InvalidEvent as error:
                self._place += len(made)
                return made, self._placed(error)
        self._place += len(made)
        return made, None

    def _placed(self, error: Exception) -> Exception:
        """What is wrong with the event whose turn it is."""
        return InvalidEvent(f"event {self._place}: {error}") if isinstance(error, InvalidEvent) else error

    def _make_one(self, item: object) -> AuditEntry:
        if not isinstance(item, Mapping):
            raise InvalidEvent(
                f"{type(item).__name__} is not allowed; give a mapping of log_event's arguments"
            )
        fields = dict(item)
        if unknown := sorted(str(name) for name in fields.keys() - _FIELDS):
            raise InvalidEvent(f"{unknown[0]}: not known; the fields are {', '.join(sorted(_FIELDS))}")
        return make_entry(
            self._process.encoder,
            category=fields.pop("category", None),
            action=fields.pop("action", None),
            event_id=fields.pop("id", None),
            **fields,
        )

    async def _send(self, block: list[AuditEntry], owns: list[bool]) -> None:
        """Send a block as soon as the one before is stored: their order is kept, and memory bounded."""
        await self._settle()
        own_ids: list[bool] | bool = owns if any(owns) else False
        self._on_way = asyncio.create_task(self._state.writer.put_block(block, own_ids=own_ids))

    async def _settle(self) -> None:
        task = self._on_way
        if task is None:
            return
        items = await asyncio.shield(task)
        self._on_way = None
        self._ids += [uuid_of(item.entry.id) for item in items]
        threshold = self._process.threshold
        for item in items:
            score = item.entry.score
            if item.answer and score is not None and score >= threshold:
                await self._tell(self._state, item.entry, threshold, self._state.loop.time() + self._seconds)


def _look_at(task: asyncio.Task[list[Item]]) -> None:
    if not task.cancelled():
        task.exception()  # told by the error that ended the call, or nobody waits any more


async def _portions(events: Events) -> AsyncIterator[list[Mapping[str, Any]]]:
    taken: list[Mapping[str, Any]] = []
    if isinstance(events, AsyncIterable):
        async for event in events:
            taken.append(event)
            if len(taken) >= _TAKEN:
                yield taken
                taken = []
    else:
        for event in events:
            taken.append(event)
            if len(taken) >= _TAKEN:
                yield taken
                taken = []
                await asyncio.sleep(0)  # others of this loop have their turns
    if taken:
        yield taken
