"""Imports of foreign logs into a real database.

Promises:
- the real sshd log is read whole: the attacking addresses are named in the order of their failures and flagged
  with reasons, and nobody else's;
- a second run adds nothing, whether it resumes or reads all again, also under another name; a grown file goes on
  where it stopped; a run that was stopped in the middle is finished by the next;
- another file that begins with the same line, or with a blank one, is read whole, and so is one that another
  tenant imported; a second run over either resumes;
- bad lines are told by number and counted, and don't stop the others;
- exported events come back the same.
"""

# ruff: noqa: E501 (tables read best by the line)

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dotmac.platform.audit_trail import AuditAggregator, import_events
from dotmac.platform.errors import InvalidArgument

REAL = Path(__file__).parents[3] / "shared" / "data" / "loghub" / "open" / "OpenSSH_2k.log"


@pytest.fixture
async def audit(migrated_url):
    async with AuditAggregator(migrated_url) as aggregator:
        yield aggregator


def lines(unique, count, start=0):
    return [
        f"Dec 10 06:{n // 60:02}:{n % 60:02} h{unique} sshd[{n}]: "
        f"Failed password for root from 10.0.0.{n % 3} port 22 ssh2\n"
        for n in range(start, start + count)
    ]


@pytest.mark.skipif(not REAL.exists(), reason="the loghub sample is not beside this checkout")
async def test_the_real_log_names_its_attackers(postgres_database):
    flagged = []
    async with AuditAggregator(postgres_database) as audit:
        await audit.migrate()
        found = await import_events(
            audit, REAL, format="sshd", year=2015, time_zone=UTC, on_anomaly=flagged.append
        )
        assert (found.lines, found.bad, found.present) == (2000, 0, 0)
        assert found.stored == await audit.count_events() > 500
        assert found.first == datetime(2015, 12, 10, 6, 55, 46, tzinfo=UTC)
        assert [address for address, _ in found.top_attackers(6)] == [
            "183.62.140.253", "187.141.143.180", "103.99.0.122", "112.95.230.3", "5.188.10.180", "185.190.58.151",
        ]  # fmt: skip
        for address, _ in found.top_attackers(6):
            assert found.flagged[address].score >= 0.5
            assert "failed logins" in found.flagged[address].reasons[0]
        assert len(flagged) == found.anomalies == await audit.count_events(min_anomaly_score=0.5)
        # The one honest user of that morning logs in once.
        assert "119.137.62.142" not in found.flagged
        again = await import_events(audit, REAL, format="sshd", year=2015, time_zone=UTC)
        assert (again.lines, again.stored, again.resumed_at) == (0, 0, 2000)
        whole = await import_events(
            audit, REAL, format="sshd", year=2015, time_zone=UTC, resume=False, on_anomaly=flagged.append
        )
        assert (whole.lines, whole.stored, whole.present) == (2000, 0, found.stored)
        assert len(flagged) == found.anomalies
        assert await audit.count_events() == found.stored


async def test_a_grown_file_goes_on_where_it_stopped(audit, unique, tmp_path):
    log = tmp_path / "auth.log"
    log.write_text("".join(lines(unique, 50)))
    assert (await import_events(audit, log, format="sshd", year=2015)).stored == 50
    with log.open("a") as more:
        more.writelines(lines(unique, 30, start=50))
    moved = shutil.copy(log, tmp_path / "moved.log")
    second = await import_events(audit, moved, format="sshd", year=2015)
    assert (second.resumed_at, second.lines, second.stored) == (50, 30, 30)
    assert await audit.count_events(resource_id=f"h{unique}") == 80


@pytest.mark.parametrize("head", ["", "\n", "\n\n\n"])
async def test_another_file_with_the_same_first_line_is_read_whole(audit, unique, tmp_path, head):
    first, one, two = lines(unique, 1), lines(unique, 50, start=1), lines(unique, 30, start=100)
    if head:
        first = []
    (tmp_path / "one").write_text("".join([head, *first, *one]))
    (tmp_path / "two").write_text("".join([head, *first, *two]))
    (tmp_path / "three").write_text("".join([head, *first, *one, *two]))
    stored, resumed = [], []
    for name in ("one", "two", "three", "two", "two", "one"):
        found = await import_events(audit, tmp_path / name, format="sshd", year=2015)
        stored.append(found.stored)
        resumed.append(found.resumed_at > 0)
    assert stored[0] == len(first + one)
    assert stored[1] == len(two)
    assert stored[3:] == [0, 0, 0]
    assert resumed[2] is (head != "")  # where the first line with a word in it differs, it is another source
    assert resumed[4]


async def test_a_file_of_another_tenant_is_read_whole(audit, unique, tmp_path):
    log = tmp_path / "auth.log"
    log.write_text("".join(lines(unique, 20)))
    for tenant in (f"{unique}a", f"{unique}b"):
        found = await import_events(audit, log, format="sshd", year=2015, tenant_id=tenant)
        assert (found.stored, found.resumed_at) == (20, 0)
        assert await audit.count_events(tenant_id=tenant) == 20


async def test_a_stopped_run_is_finished_by_the_next(audit, unique, tmp_path):
    log = tmp_path / "auth.log"
    log.write_text("".join(lines(unique, 3500)))

    class StoppedError(Exception):
        pass

    def stop(progress):
        assert 0 < progress.position <= progress.size == log.stat().st_size
        raise StoppedError

    with pytest.raises(StoppedError):
        await import_events(audit, log, format="sshd", year=2015, progress=stop)
    rest = await import_events(audit, log, format="sshd", year=2015)
    assert 0 < rest.resumed_at < 3500
    assert rest.resumed_at + rest.lines == 3500
    assert await audit.count_events(resource_id=f"h{unique}") == 3500


async def test_bad_lines_are_told_by_number(audit, unique, tmp_path):
    log = tmp_path / "auth.log"
    good = [line.encode() for line in lines(unique, 4)]
    log.write_bytes(
        b"".join([good[0], b"nonsense\n", good[1], b"\xff\xfe\n", b"\n", good[2], b"Dec 99 06:55:46 h sshd[1]: x\n",
                  b"Dec 10 06:00:00 h sshd[1]: Invalid user a\x00b from 1.2.3.4\n", good[3].rstrip(b"\n")])
    )  # fmt: skip
    found = await import_events(audit, log, format="sshd", year=2015)
    assert (found.stored, found.lines) == (4, 9)
    assert [number for number, _ in found.bad_lines] == [2, 4, 7, 8]
    assert found.bad == 4
    assert "UTF-8" in found.bad_lines[1][1]
    assert "NUL" in found.bad_lines[3][1]


async def test_ndjson_brings_exported_events_back(audit, unique, tmp_path):
    for number in range(5):
        await audit.log_event(
            "DATA_CHANGE", "x", "warning", outcome="denied", user_id=f"u{number}", tenant_id=unique,
            resource_type="r", resource_id=number, ip_address="10.0.0.7", metadata={"n": [number, "☃"]},
        )  # fmt: skip
    events = [event.to_dict() for event in await audit.query_events(tenant_id=unique)]
    log = tmp_path / "events.ndjson"
    wrong = ["[]", "{", '{"category": "SECURITY"}', '{"occurred_at": "x"}', '{"who": 1}', "[" * 100_000]
    copies = [json.dumps({**event, "tenant_id": unique + "b"}) for event in events]
    log.write_text("\n".join(copies + wrong))
    found = await import_events(audit, log, format="ndjson")
    assert (found.stored, found.bad) == (5, len(wrong))
    back = [event.to_dict() for event in await audit.query_events(tenant_id=unique + "b")]
    other = ("id", "recorded_at", "tenant_id", "anomaly_score", "anomaly_reasons")

    def told(event):
        return {key: value for key, value in event.items() if key not in other}

    assert [told(event) for event in back] == [told(event) for event in events]


async def test_bad_arguments_are_refused(audit, tmp_path):
    with pytest.raises(InvalidArgument, match=r"format.*sshd, ndjson"):
        await import_events(audit, tmp_path, format="csv")
    with pytest.raises(InvalidArgument, match=r"path.*readable"):
        await import_events(audit, tmp_path / "none", format="sshd")
    with pytest.raises(InvalidArgument, match=r"path.*readable"):
        await import_events(audit, tmp_path, format="sshd")
    with pytest.raises(InvalidArgument, match="year"):
        await import_events(audit, tmp_path, format="sshd", year=1492)
    (tmp_path / "empty").write_text("")
    assert (await import_events(audit, tmp_path / "empty", format="sshd")).lines == 0
