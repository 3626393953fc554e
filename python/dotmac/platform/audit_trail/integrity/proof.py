"""Proofs that one event is in the trail, checked without the database.

A proof is a JSON object: the event's canonical bytes, its path to the root of its segment (RFC 9162, section
2.1.3), the segment, its path to the root of its tenant's log, and a signed checkpoint of that log.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dotmac.platform import _native
from dotmac.platform.audit_trail.ids import micros
from dotmac.platform.audit_trail.integrity.notes import Checkpoint, open_note
from dotmac.platform.audit_trail.integrity.report import in_reach
from dotmac.platform.errors import InvalidCheckpoint, InvalidProof, NotProvable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime
    from uuid import UUID

    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["FORMAT", "CheckedProof", "check_proof", "prove"]

FORMAT = "dotmac-audit-proof/1"
_MOST_STEPS = 64
_MOST_ROWS = 100
_HASH_BYTES = 32
# Has sealing gone past a segment, or a checkpoint covered more than there is?
_PASSED = """
    SELECT s.recorded_tx < (SELECT max(recorded_tx) FROM audit_log)
        AND s.recorded_at < (SELECT max(sealed_at) FROM audit_log) - interval '1 minute'
        OR (SELECT max(size) FROM audit_checkpoints WHERE tenant_id = s.tenant_id)
            > (SELECT count(*) FROM audit_log WHERE tenant_id = s.tenant_id)
    FROM audit_segments s WHERE s.id = $1
"""


@dataclass(frozen=True, slots=True)
class CheckedProof:
    """What a proof that holds says.

    Attributes: event: the event as it was stored; `occurred_at` in microseconds since 1970, null fields left
        out. segment: what covers it; `recorded_at` is when the database took it. origin, size: the log and
        the checkpoint. key: the public key that signed it.
    """

    event: dict[str, Any]
    segment: dict[str, Any]
    origin: str
    size: int
    key: bytes


def check_proof(proof: Mapping[str, Any] | str | bytes, keys: Iterable[bytes]) -> CheckedProof:
    """Check a proof; nothing but the proof and the keys is needed.

    Args:
        proof: the object, or its JSON text.
        keys: public keys that are trusted, 32 bytes each.
    Returns: what it proves.
    Raises: InvalidProof: malformed, or a step does not hold. InvalidCheckpoint: no trusted key signed it.
    Source: RFC 9162, section 2.1.3.2; C2SP tlog-checkpoint.
    """
    found = _object(proof)
    if found.get("format") != FORMAT:
        raise InvalidProof(f"format: {found.get('format')!r} is not {FORMAT!r}")
    checkpoint, key = open_note(_member(found, "checkpoint", str), keys)
    event, segment = _follow(found, checkpoint)
    return CheckedProof(event, segment, checkpoint.origin, checkpoint.size, key)


def _follow(found: dict[str, Any], checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """The event and the segment, if their paths lead to the checkpoint's root."""
    canonical = _member(found, "event", str)
    segment = _member(found, "segment", dict)
    event = _object(canonical)
    # Whoever reads the event as JSON must read what was hashed.
    try:
        same = _native.canonical_json(canonical) == canonical.encode()
    except (ValueError, UnicodeEncodeError) as error:
        raise InvalidProof(f"event: {error}") from None
    if not same:
        raise InvalidProof("event: not canonical JSON (RFC 8785)")
    if event.get("tenant_id", "") != segment.get("tenant_id"):
        raise InvalidProof("the event and its segment say different tenants")
    root = _root(
        hashlib.sha256(b"\x00" + canonical.encode()).digest(),
        found,
        "leaf_index",
        _number(segment, "size"),
        "segment_path",
    )
    if root.hex() != segment.get("root"):
        raise InvalidProof("the event is not in the segment: its path leads to another root")
    root = _root(_leaf(segment), found, "log_index", checkpoint.size, "log_path")
    if root != checkpoint.root:
        raise InvalidProof("the segment is not in the log: its path leads to another root")
    return event, segment


def _leaf(segment: dict[str, Any]) -> bytes:
    """The leaf hash of a segment as JSON types (RFC 6962, section 2.1).

    RFC 8785 where numbers are integers, as in all that was hashed: those that are not lead to another hash.
    """
    try:
        text = json.dumps(segment, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(b"\x00" + text.encode()).digest()
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidProof(f"segment: {error}") from None


def _root(leaf: bytes, proof: dict[str, Any], index: str, size: int, path: str) -> bytes:
    steps = _member(proof, path, list)
    try:
        hashes = [bytes.fromhex(step) for step in steps]
    except (TypeError, ValueError):
        raise InvalidProof(f"{path}: give hashes in hexadecimal") from None
    if len(hashes) > _MOST_STEPS or any(len(step) != len(leaf) for step in hashes):
        raise InvalidProof(f"{path}: give at most {_MOST_STEPS} hashes of 32 bytes")
    root = _native.merkle_root_of_inclusion(leaf, _number(proof, index), size, hashes)
    if root is None:
        raise InvalidProof(f"{path}: {len(hashes)} steps do not lead from place {proof[index]} of {size}")
    return root


def _object(value: Mapping[str, Any] | str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(value) if isinstance(value, str | bytes) else value
    except (ValueError, RecursionError) as error:
        raise InvalidProof(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidProof("give a JSON object")
    return found


def _member(value: dict[str, Any], name: str, kind: type) -> Any:
    found = value.get(name)
    if not isinstance(found, kind):
        raise InvalidProof(f"{name}: missing, or not a {kind.__name__}")
    return found


def _number(value: dict[str, Any], name: str) -> int:
    found = value.get(name)
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < 1 << 63:
        raise InvalidProof(f"{name}: missing, or not a number that counts something")
    return found


class Segment(NamedTuple):
    """A row of `audit_segments`: the events that one commit stored for one tenant."""

    id: UUID
    writer: UUID
    tenant_id: str
    seq: int
    size: int
    root: bytes
    link: bytes
    first_at: datetime
    last_at: datetime
    recorded_at: datetime

    @classmethod
    def of(cls, row: asyncpg.Record) -> Segment:
        """The segment of a row that has its columns."""
        return cls(*(row[name] for name in cls._fields))

    def to_dict(self) -> dict[str, Any]:
        """The segment as JSON types: hashes in hexadecimal, times in microseconds since 1970."""
        return {
            "id": str(self.id),
            "writer": str(self.writer),
            "tenant_id": self.tenant_id,
            "seq": self.seq,
            "size": self.size,
            "root": self.root.hex(),
            "first_at": micros(self.first_at),
            "last_at": micros(self.last_at),
            "link": self.link.hex(),
            "recorded_at": micros(self.recorded_at),
        }


async def prove(connection: Connection, event_id: UUID) -> dict[str, Any]:
    """Make the proof of an event; see `AuditAggregator.prove`. All of it but the signature was checked."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        # Whoever may insert can give another row the same id: that is not to keep the event from its proof.
        places = await connection.fetch(
            f"SELECT segment, leaf FROM audit_events WHERE id = $1 ORDER BY segment LIMIT {_MOST_ROWS}",  # noqa: S608 (a constant)
            event_id,
        )
        if not places:
            raise NotProvable(f"there is no event {event_id}")
        refused = NotProvable(f"event {event_id} is in no segment: it was stored without integrity")
        for segment, leaf in places:
            if segment is None:
                continue
            try:
                return await _prove(connection, event_id, segment, leaf)
            except NotProvable as error:
                refused = error if error.later or not refused.later else refused
            except (ValueError, OverflowError, InvalidProof, InvalidCheckpoint) as error:
                if not refused.later:
                    refused = NotProvable(
                        f"event {event_id}, its segment or its log is not what was stored ({error}): "
                        "verify the trail"
                    )
                    refused.__cause__ = error
        raise refused


async def _prove(
    connection: Connection, event_id: UUID, segment_id: UUID, leaf: int | None
) -> dict[str, Any]:
    """`prove`, of one row. Raises: NotProvable; anything else where something was changed."""
    columns = (in_reach(name, name) if name.endswith("_at") else name for name in Segment._fields)
    row = await connection.fetchrow(
        f"SELECT {', '.join(columns)}, leaves FROM audit_segments WHERE id = $1",  # noqa: S608 (constants)
        segment_id,
    )
    if row is None:
        raise NotProvable(f"segment {segment_id} of event {event_id} is gone: verify the trail")
    if leaf is None or None in (row[name] for name in Segment._fields):
        raise ValueError("null stands where none can be")
    segment = Segment.of(row)
    canonical, leaves = await _event(connection, segment, row["leaves"], event_id, leaf)
    position, checkpoint, log = await _log(connection, segment)
    proof = {
        "format": FORMAT,
        "event": canonical.decode(),
        "leaf_index": leaf,
        "segment_path": _path(leaves, leaf),
        "segment": segment.to_dict(),
        "log_index": position,
        "log_path": _path(log, position),
        "checkpoint": checkpoint,
    }
    _follow(proof, Checkpoint.parse(checkpoint.rpartition("\n\n")[0] + "\n"))
    return proof


def _path(leaves: bytes, index: int) -> list[str]:
    return [step.hex() for step in _native.merkle_inclusion(leaves, index)]


async def _event(
    connection: Connection, segment: Segment, leaves: bytes | None, event_id: UUID, leaf: int
) -> tuple[bytes, bytes]:
    """The event's canonical bytes, and all leaf hashes of its segment."""
    from dotmac.platform.audit_trail.integrity.events import copy_events

    pieces: list[bytes] = []
    one = "" if leaves is None else f" AND id = '{event_id}'"
    await copy_events(connection, f"segment = '{segment.id}'{one}", pieces.append)
    events = sorted(
        (-1 if place is None else place, event, canonical)
        for place, event, canonical in _native.canonical_events(b"".join(pieces))
    )
    if leaves is None:
        leaves = b"".join(hashlib.sha256(b"\x00" + canonical).digest() for _, _, canonical in events)
    if _native.merkle_root(leaves) != segment.root:
        raise ValueError("the segment's events do not lead to its root")
    found = [canonical for place, event, canonical in events if (place, event) == (leaf, event_id.bytes)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} events have its place")
    if hashlib.sha256(b"\x00" + found[0]).digest() != leaves[_HASH_BYTES * leaf : _HASH_BYTES * (leaf + 1)]:
        raise ValueError("another leaf stands at the event's place")
    return found[0], leaves


async def _log(connection: Connection, segment: Segment) -> tuple[int, str, bytes]:
    """The segment's place in its log, the oldest checkpoint that covers it, the log's leaves up to there."""
    entry = await connection.fetchrow(
        "SELECT tenant_id, position, leaf FROM audit_log WHERE segment = $1", segment.id
    )
    if entry is None:
        if await connection.fetchval(_PASSED, segment.id):
            raise ValueError("its entry in the log is gone")
        raise NotProvable(f"segment {segment.id} is not sealed yet", later=True)
    tenant, position, leaf = entry
    if position is None or (tenant, leaf) != (segment.tenant_id, _leaf(segment.to_dict())):
        raise ValueError("its entry in the log is another one's")
    newest = await connection.fetchrow(
        "SELECT size, note FROM audit_checkpoints WHERE tenant_id = $1 AND (size > $2 OR size IS NULL) "
        "ORDER BY size, signed_at LIMIT 1",
        segment.tenant_id,
        position,
    )
    if newest is None:
        before = await connection.fetchval(
            "SELECT count(*) FROM audit_log WHERE tenant_id = $1 AND position < $2",
            segment.tenant_id,
            position,
        )
        if before != position:
            raise ValueError(f"{before} entries of the log are before number {position}")
        raise NotProvable(f"no checkpoint covers segment {segment.id} yet", later=True)
    rows = await connection.fetch(
        "SELECT leaf FROM audit_log WHERE tenant_id = $1 AND position < $2 ORDER BY position",
        segment.tenant_id,
        newest["size"],
    )
    return position, newest["note"] or "", b"".join(row["leaf"] or b"" for row in rows)
