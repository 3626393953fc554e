"""Archives: months as Parquet, read by queries as if they had stayed.

Promises:
- every event of an archived month comes back equal to what it was, whatever is in it;
- filters, orders, pages in both directions, counts and lookups give over table and archives together what
  they gave when all was in the table; a page that begins in the table goes on in the archives;
- while retention is at work, each reading sees every event once;
- a file that can't be written, is damaged on the way, later, or lost, is told as such; nothing is dropped
  unless what was read back is what was written; the next run begins anew;
- any place that fsspec knows will do; readers who are bound to a tenant see that tenant's events alone;
- late events of an archived month are kept beside its archive, and archived in their turn.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from dotmac.platform.audit_trail import AuditAggregator, TenantMissing
from dotmac.platform.errors import ArchiveError, AuditUnavailable, InvalidArgument
from support.roles import address_of, made_roles

FIRST = datetime(2023, 1, 1, tzinfo=UTC)
AWKWARD = [
    None,
    {},
    {
        "text": "a,b\n\"c\" \\. \\N NULL 'd'\r\n\t",
        "empty": "",
        "null": None,
        "☃": ["ü", {"x": [1, 2.5, True]}],
    },
    {"big": 12345678901234567890123, "small": 1e-300, "deep": {"a": {"b": {"c": {"d": []}}}}},
    {"large": "x" * 200_000, "quotes": '"' * 100_000},
]


async def fill(audit, events=300, months=4, seed=1):
    """Events over some months, made by chance, of several at the very same time."""
    chance = random.Random(seed)
    pick = chance.choice

    async def one(place):
        moment = FIRST + timedelta(days=chance.randrange(30 * months), hours=place % 24)
        await audit.log_event(
            pick(["SECURITY", "DATA_ACCESS", "AUTHENTICATION"]),
            pick(["user.login", "record.read", 'odd, "name"\n', "\\.", "x_y%z"]),
            pick(["INFO", "WARNING"]),
            outcome=pick(["success", "failure"]),
            user_id=pick([None, "", "ada", "bob"]),
            tenant_id=pick([None, "acme", "globex"]),
            resource_type=pick([None, "record"]),
            resource_id=pick([None, 7, ""]),
            ip_address=pick([None, "10.0.0.7", "10.0.1.9", "2001:db8::1"]),
            correlation_id=pick([None, "c1"]),
            metadata=AWKWARD[place % 40]
            if place % 40 < len(AWKWARD)
            else {"place": place, "total": place / 4},
            occurred_at=moment,
        )

    await asyncio.gather(*(one(place) for place in range(events)))


def ours(events):
    """Without what retention says of itself."""
    return [event for event in events if not event.action.startswith("audit.")]


async def everything(audit, **arguments):
    return ours([event async for event in audit.iter_events(**arguments)])


@pytest.fixture
async def audit(postgres_database):
    async with AuditAggregator(postgres_database) as aggregator:
        await aggregator.migrate()
        yield aggregator


@pytest.fixture
async def archived(audit, tmp_path):
    """An aggregator whose months before 2023-04 are archived, and all events as they were before."""
    await fill(audit)
    before = await everything(audit)
    days = (datetime.now(UTC) - datetime(2023, 4, 2, tzinfo=UTC)).days
    done = await audit.apply_retention(days, archive_url=str(tmp_path))
    assert [one.outcome for one in done] == ["dropped"] * 3
    assert sum(one.events for one in done) == sum(event.occurred_at.month < 4 for event in before)
    return audit, before


async def test_every_event_comes_back_as_it_was(archived):
    audit, before = archived
    after = await everything(audit, include_archive=True)
    assert after == before
    assert [event.to_dict() for event in after] == [event.to_dict() for event in before]
    left = await everything(audit)
    assert left == [event for event in before if event.occurred_at.month >= 4]
    assert 0 < len(left) < len(before)


FILTERS = [
    {},
    {"user_id": "ada"},
    {"user_id": ""},
    {"user_id": ["ada", "bob"], "categories": "SECURITY"},
    {"tenant_id": "acme", "outcome": "failure"},
    {"actions": "user.*"},
    {"actions": ["x_y%z", "\\."]},
    {"ip_address": "10.0.0.0/16", "levels": "WARNING"},
    {"ip_address": "2001:db8::/32"},
    {"metadata": {"total": {"gte": 20, "lt": 40}}},
    {"metadata": {"☃": {"exists": True}}},
    {"text": "odd"},
    {"missing": "tenant_id"},
    {"exclude": {"user_id": "ada"}},
    {"resource_id": 7, "correlation_id": "c1"},
    {"start_time": FIRST + timedelta(days=40), "end_time": FIRST + timedelta(days=70)},
    {"end_time": FIRST - timedelta(days=1)},
    {"min_anomaly_score": 0.9},
]


async def test_queries_give_what_they_gave_before(audit, tmp_path):
    await fill(audit, 250)
    expected = {}
    for number, order in itertools.product(range(len(FILTERS)), ("asc", "desc")):
        expected[number, order] = await everything(audit, order=order, **FILTERS[number])
    counts = [len(expected[number, "asc"]) for number in range(len(FILTERS))]
    assert sum(count > 0 for count in counts) > 12
    await audit.apply_retention(
        (datetime.now(UTC) - datetime(2023, 3, 2, tzinfo=UTC)).days, archive_url=tmp_path.as_uri()
    )
    assert len(await audit.list_archives()) == 2
    for number, order in itertools.product(range(len(FILTERS)), ("asc", "desc")):
        for size in (13, 1000):
            found = await everything(
                audit, order=order, page_size=size, include_archive=True, **FILTERS[number]
            )
            assert found == expected[number, order], (FILTERS[number], order, size)
    for number, count in enumerate(counts):
        limits = {"end_time": FIRST + timedelta(days=200)} | FILTERS[number]
        assert await audit.count_events(include_archive=True, **limits) == count, FILTERS[number]


async def test_pages_are_walked_back_across_the_border(archived):
    audit, before = archived
    arguments = {"limit": 11, "include_archive": True, "end_time": FIRST + timedelta(days=200)}
    pages = [await audit.query_events(**arguments)]
    while pages[-1].next_cursor is not None:
        pages.append(await audit.query_events(cursor=pages[-1].next_cursor, **arguments))
    assert list(itertools.chain(*pages)) == before
    back = pages[-1]
    for page in reversed(pages[:-1]):
        back = await audit.query_events(cursor=back.previous_cursor, **arguments)
        assert back == page


async def test_an_archived_event_is_found_by_its_id(archived):
    audit, before = archived
    for event in (before[0], before[-1]):
        assert await audit.get_event(event.id, include_archive=True) == event
    assert await audit.get_event(before[-1].id) is None
    assert await audit.get_event("01890000-0000-7000-8000-000000000000", include_archive=True) is None


async def test_each_reading_sees_every_event_once_while_retention_works(audit, tmp_path):
    await fill(audit, 200, months=6)
    before = await everything(audit)
    finished = asyncio.Event()
    looks = 0

    async def look(arguments):
        nonlocal looks
        while not finished.is_set():
            assert await everything(audit, include_archive=True, **arguments) == before
            looks += 1

    readers = [asyncio.create_task(look(arguments)) for arguments in ({}, {"page_size": 29})]
    done = await audit.apply_retention(30, archive_url=str(tmp_path))
    finished.set()
    await asyncio.gather(*readers)
    assert len(done) == 6
    assert looks > 3
    assert await everything(audit) == []


async def test_late_events_stand_beside_the_archive_and_follow_it(archived, tmp_path):
    audit, before = archived
    late = await audit.log_event("SECURITY", "late", occurred_at=before[-1].occurred_at)
    found = await everything(audit, include_archive=True)
    assert len(found) == len(before) + 1
    assert [(event.occurred_at, event.id) for event in found] == sorted(
        ((event.occurred_at, event.id) for event in found), reverse=True
    )
    (again,) = [
        one for one in await audit.apply_retention(1000, archive_url=str(tmp_path)) if one.events == 1
    ]
    assert again.outcome == "dropped"
    assert await everything(audit, include_archive=True) == found
    assert (await audit.get_event(late, include_archive=True)).action == "late"


class Rotten(LocalFileSystem):
    """A disk that changes a byte of what is written."""

    protocol = "rotten"

    def _open(self, path, mode="rb", **arguments):
        file = super()._open(path, mode, **arguments)
        if "w" in mode:
            write = file.write
            file.write = lambda data: write(
                bytes([data[0] ^ 1]) + bytes(data[1:]) if len(data) > 100 else data
            )
        return file


class Full(LocalFileSystem):
    """A disk that takes a thousand bytes."""

    protocol = "full"

    def _open(self, path, mode="rb", **arguments):
        file = super()._open(path, mode, **arguments)
        if "w" in mode:

            def refuse(data):
                raise OSError(28, "No space left on device")

            file.write = refuse
        return file


@pytest.mark.parametrize(("disk", "text"), [(Rotten, "SHA-256"), (Full, "No space left")])
async def test_nothing_is_dropped_unless_it_is_read_back(audit, tmp_path, disk, text):
    fsspec.register_implementation(disk.protocol, disk, clobber=True)
    await fill(audit, 60, months=1)
    before = await everything(audit)
    with pytest.raises(ArchiveError, match=text):
        await audit.apply_retention(30, archive_url=f"{disk.protocol}://{tmp_path}")
    assert await everything(audit) == before
    assert [one["state"] for one in await audit.list_archives()] == ["kept"]
    await audit.log_event("SECURITY", "late", occurred_at=FIRST)  # the month takes events again
    (done,) = await audit.apply_retention(30, archive_url=str(tmp_path))
    assert done.events == 61
    assert len(await everything(audit, include_archive=True)) == 61


async def test_an_archive_that_is_lost_or_changed_is_told(archived):
    audit, _ = archived
    path = Path((await audit.list_archives())[0]["url"])
    whole = path.read_bytes()
    damages = {
        "gone": None,
        "can't be read": b"PAR1" + whole[4:-4] + b"XXXX",
        "can't be read: ": whole[:300] + bytes(200) + whole[500:],
    }
    for text, damaged in damages.items():
        if damaged is None:
            path.unlink()
        else:
            path.write_bytes(damaged)
        with pytest.raises(ArchiveError, match=text) as caught:
            await everything(audit, include_archive=True)
        assert str(path) in str(caught.value)
        path.write_bytes(whole)
    await everything(audit, include_archive=True)


async def test_any_place_of_fsspec_will_do(audit):
    await fill(audit, 50, months=1)
    before = await everything(audit)
    (done,) = await audit.apply_retention(30, archive_url="memory://bucket/audit/")
    assert done.archive.startswith("memory://bucket/audit/2023/audit_events_2023_01-")
    assert MemoryFileSystem().exists(done.archive)
    assert await everything(audit, include_archive=True) == before
    for wrong, text in (("s4://bucket", "fsspec"), ("relative/path", "absolute")):
        with pytest.raises(InvalidArgument, match=text):
            await audit.apply_retention(30, archive_url=wrong)


async def test_a_reader_of_one_tenant_sees_its_archived_events_alone(archived, unique, postgres_database):
    audit, before = archived
    await audit.enable_tenants()
    async with made_roles(postgres_database, unique):
        await audit.grant_role("reader", unique)
        async with AuditAggregator(address_of(postgres_database, unique)) as reader:
            for tenant in ("acme", "globex"):
                wanted = [event for event in before if event.tenant_id == tenant]
                assert await everything(reader, include_archive=True, tenant_id=tenant) == wanted
                count = await reader.count_events(include_archive=True, tenant_id=tenant, text="e")
                assert count == await audit.count_events(include_archive=True, tenant_id=tenant, text="e")
            other = next(event for event in reversed(before) if event.tenant_id == "globex")
            assert await reader.get_event(other.id, include_archive=True, tenant_id="acme") is None
            with pytest.warns(TenantMissing):
                assert await reader.query_events(include_archive=True) == []
        await audit.revoke_role("reader", unique)
        await audit.grant_role("reader", unique, tenant_id="acme")
        async with AuditAggregator(address_of(postgres_database, unique)) as reader:
            wanted = [event for event in before if event.tenant_id == "acme"]
            assert await everything(reader, include_archive=True) == wanted
            assert await everything(reader, include_archive=True, tenant_id="globex") == []
            assert await everything(reader, include_archive=True, exclude={"tenant_id": "acme"}) == []


async def test_a_sealed_month_holds_late_events_back_but_not_others(audit, postgres_database):
    async with AuditAggregator(postgres_database, timeout=4.0) as impatient:
        await fill(audit, 10, months=1)
        import asyncpg

        owner = await asyncpg.connect(postgres_database)
        try:
            await owner.execute(
                "CREATE TRIGGER audit_sealed BEFORE INSERT ON audit_events_2023_01 "
                "FOR EACH ROW EXECUTE FUNCTION audit_refuse_insert()"
            )
            with pytest.raises(AuditUnavailable, match="on its way out"):
                await impatient.log_event("SECURITY", "late", occurred_at=FIRST)
            await impatient.log_event("SECURITY", "now")
            waiting = asyncio.create_task(audit.log_event("SECURITY", "patient", occurred_at=FIRST))
            await asyncio.sleep(0.2)
            await owner.execute("DROP TRIGGER audit_sealed ON audit_events_2023_01")
            await waiting
        finally:
            await owner.close()
    assert await audit.count_events(actions="patient", text="patient") == 1
