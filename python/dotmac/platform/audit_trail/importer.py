"""Taking foreign logs into the trail: constant memory, resumable, bad lines counted and never fatal.

An event's id is made of the tenant, the source's first line that is not blank, the line's number and the line
itself, so reading a file again adds nothing, wherever the file lies by then and however it has grown. Where a
run stopped is kept in the table `audit_imports`, written after the events before it are durable, with a
digest of the text before it: another file that begins with the same line is read from its start.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from dotmac.platform.audit_trail.anomaly import anomaly_of
from dotmac.platform.audit_trail.entry import make_entry
from dotmac.platform.audit_trail.ids import from_micros, micros, uuid7
from dotmac.platform.audit_trail.privacy import Given
from dotmac.platform.audit_trail.sshd import Parsed, SshdParser
from dotmac.platform.errors import InvalidArgument, InvalidEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from dotmac.platform._native import AuditEntry
    from dotmac.platform.audit_trail.aggregator import AuditAggregator
    from dotmac.platform.audit_trail.anomaly import Anomaly

__all__ = ["FORMATS", "ImportSummary", "Progress", "import_events"]

BLOCK_EVENTS = 2_000
MAX_LINE = 4 << 20
_MOST_COUNTED = 20_000
_MOST_KEPT = 100
_TAIL = 64 << 10


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an import is: bytes done and in all, lines, events stored and bad lines so far."""

    position: int
    size: int
    lines: int
    stored: int
    bad: int


@dataclass(slots=True)
class ImportSummary:
    """What one run of an import did.

    Attributes:
        source: identity of the file's content; the same wherever the file lies.
        resumed_at: number of lines that an earlier run had done, and this one skipped.
        lines: lines read by this run.
        stored: events that this run added.
        present: events that were there already.
        skipped: lines that are fine but say nothing worth an event.
        bad: lines that could not be read.
        bad_lines: the first hundred of them: number and why.
        failures: failed or denied events per address.
        flagged: anomalous events per address, with the highest score and its reasons.
        first, last: times of the earliest and the latest event.
    """

    source: str
    resumed_at: int = 0
    lines: int = 0
    stored: int = 0
    present: int = 0
    skipped: int = 0
    bad: int = 0
    bad_lines: list[tuple[int, str]] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    flagged: dict[str, Flagged] = field(default_factory=dict)
    anomalies: int = 0
    first: datetime | None = None
    last: datetime | None = None

    def top_attackers(self, count: int = 10) -> list[tuple[str, int]]:
        """The addresses with most failed or denied events, and how many."""
        return sorted(self.failures.items(), key=lambda pair: (-pair[1], pair[0]))[:count]

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON types."""
        return {
            "source": self.source,
            "resumed_at": self.resumed_at,
            "lines": self.lines,
            "stored": self.stored,
            "present": self.present,
            "skipped": self.skipped,
            "bad": self.bad,
            "bad_lines": [{"line": number, "why": why} for number, why in self.bad_lines],
            "anomalies": self.anomalies,
            "first": self.first.isoformat() if self.first else None,
            "last": self.last.isoformat() if self.last else None,
            "top_attackers": [
                {"address": address, "failures": failures} for address, failures in self.top_attackers()
            ],
            "flagged": [
                {"address": address, "events": one.events, "score": one.score, "reasons": list(one.reasons)}
                for address, one in sorted(self.flagged.items(), key=lambda pair: (-pair[1].events, pair[0]))
            ],
        }


@dataclass(frozen=True, slots=True)
class Flagged:
    """Anomalies of one address: how many events, the highest score, and why."""

    events: int
    score: float
    reasons: tuple[str, ...]


class _Parser(Protocol):
    def parse(self, line: str) -> Parsed | None: ...


class _NdjsonParser:
    """One JSON object per line, with the names of `log_event`'s arguments; `occurred_at` in ISO 8601."""

    _OTHERS = frozenset({"recorded_at", "trace_id", "span_id", "anomaly_score", "anomaly_reasons", "id"})
    _KNOWN = frozenset(
        [
            "category",
            "action",
            "level",
            "outcome",
            "user_id",
            "tenant_id",
            "resource_type",
            "resource_id",
            "ip_address",
            "correlation_id",
            "subject_id",
            "metadata",
            "occurred_at",
        ]
    )

    def parse(self, line: str) -> Parsed | None:
        said = json.loads(line)
        if not isinstance(said, dict):
            raise ValueError("not a JSON object")  # noqa: TRY004 (one kind of error per line)
        if said.pop("personal", None) is not None:
            raise ValueError("'personal' comes back from an export only, whose format the file's name tells")
        unknown = sorted(set(said) - self._KNOWN - self._OTHERS)
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}; known: {', '.join(sorted(self._KNOWN))}")
        when = said.pop("occurred_at", None)
        if not isinstance(when, str):
            raise ValueError("'occurred_at' is missing")  # noqa: TRY004 (one kind of error per line)
        moment = datetime.fromisoformat(when)
        for name in ("category", "action"):
            if name not in said:
                raise ValueError(f"{name!r} is missing")
        return Parsed(moment, {name: said[name] for name in said if name in self._KNOWN})


FORMATS = ("sshd", "ndjson")


async def import_events(
    audit: AuditAggregator,
    path: str | os.PathLike[str],
    *,
    format: str,  # noqa: A002 (the command's option)
    year: int | None = None,
    time_zone: tzinfo | None = None,
    tenant_id: str | None = None,
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
    on_anomaly: Callable[[Anomaly], None] | None = None,
) -> ImportSummary:
    """Read a log into the trail; memory does not grow with the file.

    Args:
        audit: where the events go.
        path: the file.
        format: `sshd` (syslog lines of OpenSSH) or `ndjson` (an event per line).
        year: year of the first line of an `sshd` log without years; default: inferred.
        time_zone: zone of times that bear none; default: this machine's.
        tenant_id: tenant of events that bear none.
        resume: go on where the last run stopped; False reads all again (and adds nothing twice).
        progress: called after every block.
        on_anomaly: called for every anomaly among the events that are new.

    Returns: what was done.
    Raises: InvalidArgument: unknown format, no such file. AuditUnavailable: run it again later, it resumes.
    """
    if format not in FORMATS:
        raise InvalidArgument("format", format, f"give one of {', '.join(FORMATS)}")
    if year is not None and not 1970 <= year <= datetime.now(UTC).year:  # noqa: PLR2004 (told in the text)
        raise InvalidArgument("year", year, f"give a year from 1970 to {datetime.now(UTC).year}")
    try:
        source = _Source(Path(path), format, tenant_id)
    except OSError as error:
        raise InvalidArgument("path", str(path), f"give a readable file ({error.strerror})") from error
    with source:
        return await _Import(
            audit,
            source,
            year=year,
            zone=time_zone,
            tenant_id=tenant_id,
            progress=progress,
            on_anomaly=on_anomaly,
        ).run(resume)


class _Source:
    """The file: its identity, its lines with their numbers and places."""

    def __init__(self, path: Path, format: str, tenant_id: str | None) -> None:  # noqa: A002 (the command's option)
        self.format = format
        self._file = path.open("rb")
        state = os.fstat(self._file.fileno())
        self.size = state.st_size
        self.changed = datetime.fromtimestamp(state.st_mtime, UTC)
        first = next((line for line in iter(lambda: self._file.readline(MAX_LINE), b"") if line.strip()), b"")
        tenant = (tenant_id or "").encode(errors="surrogatepass")
        self.prefix = hashlib.sha256(
            b"%s\x00%d\x00%s%s" % (format.encode(), len(tenant), tenant, first.rstrip(b"\r\n"))
        ).digest()
        self.name = self.prefix.hex()
        self.line = 0
        self._file.seek(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def position(self) -> int:
        return self._file.tell()

    def go_to(self, position: int, line: int) -> None:
        self._file.seek(position)
        self.line = line

    def digest_before(self, position: int) -> str:
        """What tells this file from another with the same first line: the text before `position`."""
        size = min(position, _TAIL)
        return hashlib.sha256(os.pread(self._file.fileno(), size, position - size)).hexdigest()

    def block(self) -> list[tuple[int, bytes]]:
        """The next lines, about as many as one commit takes; the last one only if it is whole."""
        lines: list[tuple[int, bytes]] = []
        size = 0
        while len(lines) < BLOCK_EVENTS and size < MAX_LINE:
            before = self._file.tell()
            raw = self._file.readline(MAX_LINE)
            if not raw:
                break
            if not raw.endswith(b"\n") and len(raw) < MAX_LINE and before + len(raw) < self.size:
                self._file.seek(before)
                break
            while len(raw) == MAX_LINE and not raw.endswith(b"\n"):
                rest = self._file.readline(MAX_LINE)
                if not rest or rest.endswith(b"\n"):
                    break
            self.line += 1
            lines.append((self.line, raw))
            size += len(raw)
        return lines

    def event_id(self, moment: datetime, line: int, raw: bytes, turn: int) -> Any:
        told = b"%d\x00%d\x00" % (line, turn) + raw.rstrip(b"\r\n")
        return uuid7(micros(moment), int.from_bytes(hashlib.sha256(self.prefix + told).digest()[:8]))


class _Import:
    def __init__(
        self,
        audit: AuditAggregator,
        source: _Source,
        *,
        year: int | None,
        zone: tzinfo | None,
        tenant_id: str | None,
        progress: Callable[[Progress], None] | None,
        on_anomaly: Callable[[Anomaly], None] | None,
    ) -> None:
        self._audit = audit
        self._source = source
        self._tenant_id = tenant_id
        self._start_over = False
        self._zone = zone
        self._progress = progress
        self._on_anomaly = on_anomaly
        self._summary = ImportSummary(source.name)
        # Its own: the times of an old log must not meet those of live traffic.
        self._encoder = audit.make_encoder()
        self._threshold = audit.threshold()
        self._sshd = SshdParser(year, source.changed, zone) if source.format == "sshd" else None
        self._parser: _Parser = self._sshd or _NdjsonParser()

    async def run(self, resume: bool) -> ImportSummary:
        if resume:
            await self._go_on()
        while lines := await asyncio.to_thread(self._source.block):
            await self._take(lines)
            position = self._source.position
            await self._audit.save_import(
                self._source.name,
                position,
                self._source.line,
                self._state() | {"before": self._source.digest_before(position)},
                start_over=self._start_over,
            )
            if self._progress is not None:
                found = self._summary
                self._progress(
                    Progress(self._source.position, self._source.size, found.lines, found.stored, found.bad)
                )
        return self._summary

    async def _go_on(self) -> None:
        stopped = await self._audit.load_import(self._source.name)
        if stopped is None:
            return
        position, line, state = stopped
        if position > self._source.size or state.get("before") != self._source.digest_before(position):
            self._start_over = True
            return
        self._source.go_to(position, line)
        self._summary.resumed_at = line
        if self._sshd is not None and state.get("year"):
            self._sshd.years.year = state["year"]
            self._sshd.years.last = datetime.fromisoformat(state["last"]) if state.get("last") else None

    def _state(self) -> dict[str, Any]:
        if self._sshd is None:
            return {}
        years = self._sshd.years
        return {"year": years.year, "last": years.last.isoformat() if years.last else None}

    async def _take(self, lines: list[tuple[int, bytes]]) -> None:
        rows: list[tuple[AuditEntry, Anomaly | None]] = []
        for number, raw in lines:
            try:
                made = self._rows(number, raw)
            except (ValueError, OverflowError, RecursionError) as error:  # InvalidEvent is a ValueError
                self._summary.bad += 1
                if len(self._summary.bad_lines) < _MOST_KEPT:
                    self._summary.bad_lines.append((number, str(error)[:300]))
                continue
            if not made:
                self._summary.skipped += 1
            rows += made
        new = await self._audit.store_rows([entry for entry, _ in rows])
        self._summary.lines += len(lines)
        for (entry, anomaly), is_new in zip(rows, new, strict=True):
            self._count(entry, anomaly)
            if is_new:
                self._summary.stored += 1
                if anomaly is not None and self._on_anomaly is not None:
                    self._on_anomaly(anomaly)
            else:
                self._summary.present += 1

    def _rows(self, number: int, raw: bytes) -> list[tuple[AuditEntry, Anomaly | None]]:
        if len(raw) >= MAX_LINE:
            raise ValueError(f"longer than {MAX_LINE} bytes")
        try:
            line = raw.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start}") from None
        if not line.strip():
            return []
        parsed = self._parser.parse(line)
        if parsed is None:
            return []
        moment = parsed.occurred_at
        if moment.tzinfo is None and self._zone is not None:
            moment = moment.replace(tzinfo=self._zone)
        made = []
        for turn in range(parsed.times):
            entry = self._row(parsed.fields, moment.astimezone(UTC), number, raw, turn)
            made.append((entry, anomaly_of(entry, self._threshold)))
        return made

    def _row(
        self, fields: dict[str, Any], moment: datetime, number: int, raw: bytes, turn: int
    ) -> AuditEntry:
        said = dict(fields)
        address = said.pop("ip_address", None)
        try:
            return self._make(said, address, moment, (number, raw, turn))
        except InvalidEvent:
            if address is None or self._source.format != "sshd":
                raise
            # sshd also names hosts where it should name addresses.
            said["metadata"] = {**said["metadata"], "peer": address}
            return self._make(said, None, moment, (number, raw, turn))

    def _make(
        self, said: dict[str, Any], address: object, moment: datetime, place: tuple[int, bytes, int]
    ) -> AuditEntry:
        # Redacted as what is logged is, but not filled in: who imports is not who did it.
        given = self._audit.redacted(
            said["category"],
            Given(
                action=said["action"],
                user_id=said.get("user_id"),
                tenant_id=said.get("tenant_id", self._tenant_id),
                resource_type=said.get("resource_type"),
                resource_id=said.get("resource_id"),
                ip_address=address,
                correlation_id=said.get("correlation_id"),
                metadata=said.get("metadata"),
                subject_id=said.get("subject_id"),
            ),
        )
        return make_entry(
            self._encoder,
            category=said["category"],
            action=given.action,
            level=said.get("level", "info"),
            outcome=said.get("outcome", "success"),
            user_id=given.user_id,
            tenant_id=given.tenant_id,
            resource_type=given.resource_type,
            resource_id=given.resource_id,
            ip_address=given.ip_address,
            correlation_id=given.correlation_id,
            metadata=given.metadata,
            subject_id=given.subject_id,
            occurred_at=moment,
            event_id=self._source.event_id(moment, *place),
        )

    def _count(self, entry: AuditEntry, anomaly: Anomaly | None) -> None:
        found, fields = self._summary, entry.fields()
        moment, address = from_micros(entry.occurred_at), fields["ip_address"]
        found.first = min(found.first or moment, moment)
        found.last = max(found.last or moment, moment)
        if address is None:
            found.anomalies += anomaly is not None
            return
        if fields["outcome"] in ("failure", "denied"):
            found.failures[address] += 1
            if len(found.failures) > 2 * _MOST_COUNTED:
                found.failures = Counter(dict(found.failures.most_common(_MOST_COUNTED)))
        if anomaly is not None:
            found.anomalies += 1
            before = found.flagged.get(address, Flagged(0, 0.0, ()))
            if before.events or len(found.flagged) < _MOST_COUNTED:
                best = anomaly if anomaly.score >= before.score else None
                found.flagged[address] = Flagged(
                    before.events + 1,
                    best.score if best else before.score,
                    best.reasons if best else before.reasons,
                )
