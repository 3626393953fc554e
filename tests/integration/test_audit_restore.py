"""Exports read back into a real database.

Promises:
- export then import gives the same events: random ones, through every format and compression, and a second
  import adds nothing;
- a cell that a spreadsheet would run is defused, and import gives the very text back; numbers that no float
  holds keep their digits;
- bad records are told by number and don't stop the others; a file that can't be read at all is refused.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dotmac.platform.audit_trail import AuditAggregator, AuditCategory, AuditLevel, AuditOutcome
from dotmac.platform.errors import InvalidArgument
from support.exports import audit_connection, dicts, fill, forget, same

FORMULAS = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\tx",
    "\rx",
    "\nx",
    "'x",
    "''",
    "＝1",
    "plain",
    'say "no"',
    "a,b;c",
    "",
]


@pytest.fixture
async def audit(migrated_url):
    async with AuditAggregator(migrated_url) as aggregator:
        yield aggregator


async def test_cells_that_begin_a_formula_are_defused_and_come_back(audit, unique, tmp_path):
    for user in FORMULAS:
        await audit.log_event(
            "SECURITY", "x", tenant_id=unique, user_id=user, resource_type=user, metadata={"=1": user}
        )
    place = tmp_path / "e.csv"
    await audit.export_events(place, tenant_id=unique)
    rows = list(csv.DictReader(io.StringIO(place.read_bytes().decode(), newline="")))
    for user, row in zip(FORMULAS, rows, strict=True):
        assert row["user_id"] == (f"'{user}" if user and user[0] in "=+-@\t\r\n'＝" else user)
        assert not row["metadata"].startswith(("=", "+", "-", "@"))
    before = await dicts(audit, unique)
    await forget(audit, unique)
    await audit.import_events(place)
    assert same(await dicts(audit, unique), before)


FROM, TO = datetime(2024, 1, 1), datetime(2025, 12, 31)  # noqa: DTZ001 (hypothesis adds the zone)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)
maybe = st.none() | texts
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
events = st.fixed_dictionaries(
    {
        "category": st.sampled_from(AuditCategory),
        "action": texts.filter(lambda text: text.strip()),
        "level": st.sampled_from(AuditLevel),
        "outcome": st.sampled_from(AuditOutcome),
        "user_id": maybe,
        "resource_type": maybe,
        "resource_id": maybe,
        "correlation_id": maybe,
        "ip_address": st.none() | st.ip_addresses(),
        "metadata": st.none() | st.dictionaries(texts, json_values, max_size=4),
        "occurred_at": st.none() | st.datetimes(FROM, TO, timezones=st.just(UTC)),
    }
)


@given(
    drawn=st.lists(events, max_size=8),
    name=st.sampled_from(
        ["e.json", "e.ndjson", "e.csv", "e.parquet", "e.json.gz", "e.ndjson.zst", "e.csv.zst", "e.ndjson.gz"]
    ),
)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_export_then_import_gives_the_same_events(migrated_url, tmp_path_factory, drawn, name):
    tenant = uuid4()  # a new one for each example, also while a failing one is made smaller

    async def work():
        async with AuditAggregator(migrated_url, anomaly_threshold=0.01) as audit:
            for one in drawn:
                await audit.log_event(**one, tenant_id=tenant)
            before = await dicts(audit, str(tenant))
            place = tmp_path_factory.mktemp("export") / name
            made = await audit.export_events(place, tenant_id=str(tenant))
            assert made.rows == len(drawn)
            await forget(audit, str(tenant))
            assert await dicts(audit, str(tenant)) == []
            found = await audit.import_events(place)
            assert (found.records, found.stored, found.present, found.bad) == (
                len(drawn),
                len(drawn),
                0,
                0,
            ), found.bad_records
            assert same(await dicts(audit, str(tenant)), before)
            again = await audit.import_events(place)
            assert (again.stored, again.present) == (0, len(drawn))
            assert same(await dicts(audit, str(tenant)), before)

    asyncio.run(work())


async def test_numbers_that_no_float_holds_come_back(audit, unique, tmp_path):
    numbers = '{"a": 0.1234567890123456789012345, "b": 1e400, "c": [1.5, -12345678901234567890.5], "d": 2}'
    async with audit_connection(audit) as connection:
        await connection.execute(
            "INSERT INTO audit_events "
            "(occurred_at, id, category, action, level, outcome, tenant_id, metadata) "
            "VALUES (now(), gen_random_uuid(), 'system', 'x', 'info', 'success', $1, $2)",
            unique,
            numbers,
        )
        text = "SELECT metadata::text FROM audit_events WHERE tenant_id = $1"
        before = await connection.fetchval(text, unique)
        for name in ("e.ndjson", "e.json", "e.csv", "e.parquet"):
            await audit.export_events(tmp_path / name, tenant_id=unique)
            await forget(audit, unique)
            found = await audit.import_events(tmp_path / name)
            assert found.stored == 1, found.bad_records
            assert await connection.fetchval(text, unique) == before


async def test_bad_records_are_told_by_number_and_do_not_stop_the_others(audit, unique, tmp_path):
    await fill(audit, unique, 3)
    await audit.export_events(tmp_path / "e.ndjson", tenant_id=unique)
    good = (tmp_path / "e.ndjson").read_bytes().splitlines()
    wrong = [b"{", b"[]", b'{"id": 1}', b"\xff\xfe", b'{"who": 1}',
             good[0].replace(b"data_access", b"nothing"),
             good[0].replace(b"+00:00", b"", 1), b"[" * 100_000]  # fmt: skip
    place = tmp_path / "mixed.ndjson"
    place.write_bytes(b"\n".join([good[0], *wrong, *good[1:]]))
    found = await audit.import_events(place)
    assert (found.records, found.present, found.bad) == (11, 3, 8)
    assert [number for number, _ in found.bad_records] == list(range(2, 10))
    json.dumps(found.to_dict())
    await audit.export_events(tmp_path / "e.csv", tenant_id=unique)
    lines = (tmp_path / "e.csv").read_bytes().split(b"\r\n")
    (tmp_path / "bad.csv").write_bytes(
        b"\r\n".join([lines[0], lines[1], b"a,b", b'"x"y,1', lines[2], b'"never ends'])
    )
    found = await audit.import_events(tmp_path / "bad.csv")
    assert (found.present, found.bad) == (2, 3)
    for name, text in (("a.json", "{}"), ("b.json", '[{"id": 1}, {'), ("c.csv", ""),
                       ("d.csv", "a,b\r\n1,2\r\n"),
                       ("e.parquet", "no"), ("f.ndjson.gz", "no"), ("g.ndjson.zst", "no")):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(InvalidArgument, match=name):
            await audit.import_events(tmp_path / name)


async def test_a_json_array_laid_out_by_another_tool_is_read(audit, unique, tmp_path):
    await fill(audit, unique, 20)
    await audit.export_events(tmp_path / "e.json", tenant_id=unique)
    events = json.loads((tmp_path / "e.json").read_text())
    for number, layout in enumerate(({"indent": 2}, {"separators": (",", ":")})):
        place = tmp_path / f"{number}.json"
        place.write_text(json.dumps(events, **layout))
        assert (await audit.import_events(place)).present == 20
