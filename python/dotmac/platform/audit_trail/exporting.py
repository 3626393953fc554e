"""Exports of the trail, and reading them back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dotmac.platform.audit_trail.arguments import filters_of, order_of
from dotmac.platform.audit_trail.query import Order
from dotmac.platform.audit_trail.service import Service
from dotmac.platform.audit_trail.tenancy import check_named, tenant_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from datetime import datetime

    from dotmac.platform.audit_trail.exports.restore import RestoreProgress, RestoreSummary
    from dotmac.platform.audit_trail.exports.run import ExportProgress, ExportSummary

__all__ = ["Exporting"]


class Exporting(Service):
    """The part of `AuditAggregator` that exports events and takes exports in."""

    async def export_events(
        self,
        path_or_stream: str | os.PathLike[str] | Any,
        format: str | None = None,  # noqa: A002 (the guide's name)
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        *,
        order: Order | str = Order.OLDEST_FIRST,
        compression: str | None = None,
        resume: bool = True,
        progress: Callable[[ExportProgress], None] | None = None,
        **filters: Any,
    ) -> ExportSummary:
        """Write all events of a query to a file or a stream; memory does not grow with their number.

        The export holds the events that were committed when it began, wherever it is interrupted and however
        long it takes, and no others. A file appears under its name when it is complete; until then it grows
        as `<name>.partial`. The same call after an interruption goes on where the last complete statement of
        100,000 rows ended, for a day, unless its filters, times, order or format are others.

        Args:
            path_or_stream: path, or URL of a file system that fsspec knows (`s3://…`), or an object whose
                `write` takes bytes or text and may be a coroutine.
            format: `json` (one array), `ndjson` (an object per line), `csv`, `parquet`, `pdf`, `ocsf` (an
                event of OCSF 1.6 per line); default: what the name's suffix says.
            start_time, end_time: as for `query_events`.
            order: `"asc"`, the oldest first, or `"desc"`.
            compression: `gzip` or `zstd`; default: what the name's suffix says (`.gz`, `.zst`).
            resume: keep what is good of an interrupted file, and go on with it. Parquet, PDF, URLs and
                streams always begin anew.
            progress: called with an `ExportProgress` after every piece, in the event loop; what it raises
                stops the export.
            **filters: as for `query_events`.

        Returns: rows, bytes, their SHA-256, times of the first and the last event, and what was resumed.
        Raises:
            InvalidArgument: also where another export is writing that file, and where row-level security
                shows one tenant at a time and none is named.
            ExportFailed: the place could not be written.
            MissingExtra: pyarrow, reportlab, zstandard or fsspec is needed and not installed.
            AuditUnavailable: nothing came from the database for `timeout` seconds. SchemaOutdated.
        """
        from dotmac.platform.audit_trail.exports import run
        from dotmac.platform.audit_trail.exports.source import take_snapshot

        checked, way = filters_of(start_time, end_time, filters), order_of(order)
        target = run.target_of(path_or_stream, format, compression, resume)
        tenant, sight = tenant_of(checked), await self._sight()
        check_named(sight, tenant)
        tenant = sight.setting(tenant)
        state = await self._state()
        return await run.export(
            state.database,
            target,
            checked,
            way,
            lambda: self._read(take_snapshot, tenant=tenant or ""),
            tenant=tenant,
            timeout=self._seconds(),
            progress=progress,
        )

    async def import_events(
        self,
        path_or_stream: str | os.PathLike[str] | Any,
        format: str | None = None,  # noqa: A002 (as `export_events` calls it)
        *,
        compression: str | None = None,
        progress: Callable[[RestoreProgress], None] | None = None,
    ) -> RestoreSummary:
        """Take an export in again: the same events, under their ids; what is there already stays as it is.

        Every field comes back but `recorded_at`, which says when this database took the event. For foreign
        logs there is `dotmac.platform.audit_trail.import_events`.

        Args:
            path_or_stream: path, URL, or an object whose `read` gives bytes.
            format: `json`, `ndjson`, `csv` or `parquet`; default: what the name's suffix says.
            compression: `gzip` or `zstd`; default: what the name's suffix says.
            progress: called with a `RestoreProgress` after every block that is stored.

        Returns: how many events were new, there already, or bad, with the first hundred reasons.
        Raises: InvalidArgument: no such file, or none of that format. MissingExtra. AuditUnavailable: run it
            again, nothing is stored twice.
        """
        from dotmac.platform.audit_trail.exports.restore import restore

        hashed = self._section().integrity_enabled
        return await restore(self, path_or_stream, format, compression, progress, hashed=hashed)

    if TYPE_CHECKING:

        async def store_rows(self, rows: Any) -> list[bool]:
            """See `AuditAggregator`."""
