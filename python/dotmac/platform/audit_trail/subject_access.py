"""What the trail holds about one person (GDPR, article 15), for that person: others are masked.

Events are read page by page and written as they come, so that memory does not grow with them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from uuid import UUID

from dotmac.platform.audit_trail import query
from dotmac.platform.audit_trail.arguments import filters_of
from dotmac.platform.audit_trail.erasure import PERSON_TYPES, Erasing, subject_of
from dotmac.platform.audit_trail.models import PersonalState
from dotmac.platform.audit_trail.patterns import BUILT_IN
from dotmac.platform.audit_trail.redaction import NOTE
from dotmac.platform.audit_trail.tenancy import check_named
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    import asyncpg

    from dotmac.platform.audit_trail.models import AuditEvent
    from dotmac.platform.audit_trail.subject_keys import Subject

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Accessing", "SubjectAccessSummary"]

_PAGE = 1_000
_MOST_VALUES = 1_000
_ABOUT = """
    (subject_id = $1 OR user_id = $1 OR (resource_id = $1 AND resource_type = ANY($2::text[])))
    AND coalesce(tenant_id, '') = $3 AND occurred_at >= $4 AND occurred_at < $5
    AND (occurred_at, id) > ($6::timestamptz, $7::uuid)
"""
_PAGE_SQL = f"{query.SELECT} FROM audit_events WHERE {_ABOUT} ORDER BY occurred_at, id LIMIT {_PAGE}"
_FIRST = datetime(1970, 1, 1, tzinfo=UTC)
# What metadata say about processing, by the names that the reports read as well.
_FACTS = ("purpose", "data_category", "recipient", "source", "retention", "legal_basis")
# Keys whose values name a person; in an event in which others take part, they are masked.
_NAMING = re.compile(
    r"(^|_)(user|username|user_name|login|actor|operator|person|name|first_name|last_name|full_name|display_name|"
    r"email|e_mail|mail|phone|mobile|address|ip|ip_address|peer|remote_addr|client_ip|peer_address)$",
    re.IGNORECASE,
)


@dataclass(slots=True)
class SubjectAccessSummary:
    """What an export of a person's data contains.

    Attributes:
        events: events written. categories: events by category. facts: the purposes, categories of data,
            recipients, sources, terms of retention and legal bases that the events name, with their numbers.
        personal_fields: fields of personal data that were shown. erased: events whose data were erased.
        masked: events in which other persons were masked.
    """

    subject_id: str
    tenant_id: str | None
    generated_at: datetime
    start_time: datetime
    end_time: datetime
    events: int = 0
    categories: Counter[str] = field(default_factory=Counter)
    facts: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in _FACTS})
    personal_fields: Counter[str] = field(default_factory=Counter)
    erased: int = 0
    masked: int = 0
    first: str | None = None
    last: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "events": self.events,
            "first": self.first,
            "last": self.last,
            "categories": dict(sorted(self.categories.items())),
            **{name: dict(sorted(found.items())) for name, found in self.facts.items()},
            "personal_fields": dict(sorted(self.personal_fields.items())),
            "events_with_erased_data": self.erased,
            "events_with_other_persons_masked": self.masked,
        }

    def add(self, entry: Mapping[str, Any], *, masked: bool) -> None:
        """Count an event."""
        self.events += 1
        self.first = self.first or entry["occurred_at"]
        self.last = entry["occurred_at"]
        self.categories[entry["category"]] += 1
        self.masked += masked
        for name, found in self.facts.items():
            value = entry["metadata"].get(name)
            if isinstance(value, str) and (value in found or len(found) < _MOST_VALUES):
                found[value] += 1
        if isinstance(entry["personal"], Mapping):
            self.personal_fields.update(entry["personal"].keys())
        self.erased += entry["personal"] == PersonalState.ERASED


class Accessing(Erasing):
    """The part of `AuditAggregator` that tells persons what the trail holds about them."""

    async def subject_access(
        self,
        subject_id: str | int | UUID,
        *,
        tenant_id: str | int | UUID | None = None,
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        person_types: Iterable[str] = PERSON_TYPES,
    ) -> AsyncIterator[dict[str, Any]]:
        """Everything about one subject, oldest first: events whose personal data are theirs, that they
        caused, or whose resource they are; personal data decrypted, other persons masked.

        Args:
            subject_id: who.
            tenant_id: their tenant; default: that of `audit_context`, else the one to which row-level
                security binds the role, else none.
            start_time: first moment. end_time: moment after the last; default: now.
            person_types: types of resources that are persons.

        Yields: events as `AuditEvent.to_dict` gives them, with `role` (`actor`, `subject` or `resource`).
        Raises: PersonalKeyMissing: there are personal data, and no key is configured. AuditUnavailable.
            InvalidArgument: also where row-level security shows one tenant at a time and none is named.
        """
        start, end = _period(start_time, end_time)
        subject = await self._visible(subject_of(subject_id, tenant_id))
        async for entry, _ in self._entries(subject, start, end, tuple(person_types)):
            yield entry

    async def export_subject_access(
        self,
        subject_id: str | int | UUID,
        target: str | Path | IO[str],
        *,
        format: str | None = None,  # noqa: A002 (the name that exports use)
        tenant_id: str | int | UUID | None = None,
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        person_types: Iterable[str] = PERSON_TYPES,
    ) -> SubjectAccessSummary:
        """Write what `subject_access` yields, with a summary for the person, and log that it was done.

        Args:
            target: a file, which only its owner may read and which is there when all of it is; or a text
                stream.
            format: `json`, or `html` for people; default: by the file's name.
            subject_id, tenant_id, start_time, end_time, person_types: as for `subject_access`.

        Returns: the summary that is in the file. The event is `subject.access_exported`.
        """
        kind = format or (Path(target).suffix.lstrip(".") if isinstance(target, str | Path) else "json")
        if kind not in _WRITERS:
            raise InvalidArgument("format", kind, "give 'json' or 'html'")
        start, end = _period(start_time, end_time)
        subject = await self._visible(subject_of(subject_id, tenant_id))
        summary = SubjectAccessSummary(
            subject.subject_id, subject.tenant_id or None, datetime.now(UTC), start, end
        )
        with _opened(target) as stream:
            writer = _WRITERS[kind](stream)
            writer.begin(summary)
            async for entry, masked in self._entries(subject, start, end, tuple(person_types)):
                summary.add(entry, masked=masked)
                writer.write(entry)
            writer.end(summary)
        await self._log(
            subject,
            "subject.access_exported",
            None,
            {"events": summary.events, "format": kind, "purpose": "subject access request"},
        )
        return summary

    async def _visible(self, subject: Subject) -> Subject:
        """The subject, of a tenant whose events our role sees. Raises: InvalidArgument: none is named."""
        sight = await self._sight()
        if subject.tenant_id or not sight.one_tenant:
            return subject
        check_named(sight, None)
        return subject._replace(tenant_id=sight.bound or "")

    async def _entries(
        self, subject: Subject, start: datetime, end: datetime, person_types: tuple[str, ...]
    ) -> AsyncIterator[tuple[dict[str, Any], bool]]:
        last: tuple[datetime, UUID] = (_FIRST, UUID(int=0))
        mask = _Mask(subject, person_types)
        while True:
            values = [subject.subject_id, list(person_types), subject.tenant_id, start, end, *last]

            async def work(connection: Connection, values: list[Any] = values) -> list[AuditEvent]:
                return [query.event_of(record) for record in await connection.fetch(_PAGE_SQL, *values)]

            page = await self._read(work, 10 * self._seconds(), tenant=subject.tenant_id)
            own = [
                event for event in page if event.subject_id == subject.subject_id and event.sealed is not None
            ]
            opened = (
                {event.id: event for event in await self.open_personal(own, tenant_id=subject.tenant_id)}
                if own
                else {}
            )
            for event in page:
                yield mask.shown(opened.get(event.id, event))
            if len(page) < _PAGE:
                return
            last = (page[-1].occurred_at, page[-1].id)


class _Mask:
    """Other persons become `person-1a2b3c`: the same within one export, another one in the next."""

    def __init__(self, subject: Subject, person_types: tuple[str, ...]) -> None:
        self._subject = subject.subject_id
        self._types = frozenset(person_types)
        self._salt = secrets.token_bytes(16)
        self._own_words: set[str] = {subject.subject_id}

    def shown(self, event: AuditEvent) -> tuple[dict[str, Any], bool]:
        """The event as its subject may see it, and whether anybody was masked."""
        entry = event.to_dict()
        if isinstance(event.personal, Mapping) and len(self._own_words) < _MOST_VALUES:
            self._own_words |= {value for value in event.personal.values() if isinstance(value, str)}
        others: dict[str, str] = {}
        for name in ("user_id", "subject_id", "resource_id"):
            value = entry[name]
            is_person = name != "resource_id" or entry["resource_type"] in self._types
            if value is not None and value != self._subject and is_person:
                entry[name] = others[value] = self._pseudonym(value)
        entry["role"] = (
            "actor"
            if event.user_id == self._subject
            else "subject"
            if event.subject_id == self._subject
            else "resource"
        )
        if event.subject_id != self._subject and entry["personal"] is not None:
            entry["personal"] = None  # another person's
        if not others:
            return entry, False
        if event.user_id != self._subject:
            if entry["ip_address"] is not None:
                others[entry["ip_address"]] = entry["ip_address"] = "***"
            entry["correlation_id"] = entry["trace_id"] = entry["span_id"] = None
        entry["metadata"] = {
            key: value if key == NOTE else self._without(value, key, others)
            for key, value in entry["metadata"].items()
        }
        entry["anomaly_reasons"] = [self._text(text, others) for text in entry["anomaly_reasons"]]
        return entry, True

    def _pseudonym(self, value: str) -> str:
        return "person-" + hashlib.blake2b(value.encode(), key=self._salt, digest_size=4).hexdigest()

    def _without(self, value: Any, key: str, others: dict[str, str]) -> Any:
        if isinstance(value, str):
            if value in self._own_words:
                return value
            return others.get(value, "***") if _NAMING.search(key) else self._text(value, others)
        if isinstance(value, Mapping):
            return {inner: self._without(item, inner, others) for inner, item in value.items()}
        if isinstance(value, list):
            return [self._without(item, key, others) for item in value]
        if value is not None and not isinstance(value, bool) and str(value) in others:
            return others[str(value)]
        return value

    def _text(self, text: str, others: dict[str, str]) -> str:
        for name, instead in others.items():
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead.replace("\\", r"\\"), text)
        for kind in ("email", "ip_address"):
            parts, last = [], 0
            for start, end in BUILT_IN[kind].find(text):
                if text[start:end] not in self._own_words:
                    parts += [text[last:start], "***"]
                    last = end
            text = "".join(parts) + text[last:]
        return text


# --- how it is written


class _Json:
    """One object: who, the events, and behind them the summary, which is known at the end."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._separator = ""

    def begin(self, summary: SubjectAccessSummary) -> None:
        head = json.dumps(_head(summary), ensure_ascii=False, indent=2)
        self._stream.write(head.removesuffix("\n}") + ',\n  "events": [')

    def write(self, entry: Mapping[str, Any]) -> None:
        self._stream.write(f"{self._separator}\n    {json.dumps(entry, ensure_ascii=False)}")
        self._separator = ","

    def end(self, summary: SubjectAccessSummary) -> None:
        told = json.dumps(summary.to_dict(), ensure_ascii=False, indent=2).replace("\n", "\n  ")
        self._stream.write(f'\n  ],\n  "summary": {told}\n}}\n')


class _Html:
    """One page without scripts or anything from elsewhere."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def begin(self, summary: SubjectAccessSummary) -> None:
        head = _head(summary)
        rows = "".join(f"<dt>{escape(name)}<dd>{escape(str(value))}" for name, value in head.items() if value)
        self._stream.write(
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Your data in the audit trail</title>'
            "<style>body{font:15px/1.5 sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}"
            "dt{font-weight:600}dd{margin:0 0 .4rem}table{border-collapse:collapse;width:100%}"
            "td,th{border-bottom:1px solid #ccc;padding:.3rem .5rem;text-align:left;vertical-align:top;"
            "overflow-wrap:anywhere}</style>"
            f"<h1>Your data in the audit trail</h1><dl>{rows}</dl>"
            "<p>Every event that names you: what you did, and what was done about you. Other persons are "
            "masked; “erased” stands for data that were made unreadable before.<table><thead><tr>"
            "<th>Time (UTC)<th>What happened<th>Your part<th>Your data<th>Details</thead><tbody>"
        )

    def write(self, entry: Mapping[str, Any]) -> None:
        personal = entry["personal"]
        data = _listed(personal) if isinstance(personal, Mapping) else escape(str(personal or ""))
        details = {
            "by": entry["user_id"],
            "about": " ".join(filter(None, (entry["resource_type"], entry["resource_id"]))),
            "address": entry["ip_address"],
            **entry["metadata"],
        }
        what = f"{escape(entry['action'])}<br>{escape(entry['category'])}, {escape(entry['outcome'])}"
        self._stream.write(
            f"<tr><td>{escape(entry['occurred_at'][:19].replace('T', ' '))}<td>{what}"
            f"<td>{escape(entry['role'])}<td>{data}<td>{_listed(details)}\n"
        )

    def end(self, summary: SubjectAccessSummary) -> None:
        rows = {
            name.replace("_", " "): ", ".join(f"{key} ({count})" for key, count in value.items())
            if isinstance(value, dict)
            else value
            for name, value in summary.to_dict().items()
        }
        self._stream.write(f"</tbody></table><h2>Summary</h2>{_listed(rows)}</html>\n")


_WRITERS: dict[str, type[_Json | _Html]] = {"json": _Json, "html": _Html}


def _head(summary: SubjectAccessSummary) -> dict[str, Any]:
    return {
        "subject_id": summary.subject_id,
        "tenant_id": summary.tenant_id,
        "generated_at": summary.generated_at.isoformat(timespec="seconds"),
        "start_time": summary.start_time.isoformat(timespec="seconds"),
        "end_time": summary.end_time.isoformat(timespec="seconds"),
        "basis": "GDPR Art. 15",
    }


def _listed(values: Mapping[str, Any]) -> str:
    shown = {
        str(name): value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in values.items()
        if value not in (None, "", [], {})
    }
    return "<br>".join(f"{escape(name)}: {escape(text)}" for name, text in shown.items())


def _period(start: datetime | None, end: datetime | None) -> tuple[datetime, datetime]:
    checked = filters_of(start, end, {})
    return checked.start_time or _FIRST, checked.end_time or datetime.now(UTC)


@contextmanager
def _opened(target: str | Path | IO[str]) -> Iterator[IO[str]]:
    """The stream to write to; a file takes its place when all is written, and is its owner's alone."""
    if not isinstance(target, str | Path):
        yield target
        return
    path = Path(target)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
