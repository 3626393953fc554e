"""Compliance reports over a real log.

Promises:
- every type answers with its sections, each with a control; an empty section says a sentence;
- what is in the log comes back in the right section: segregation of duties, disabled users, breaches counted
  once per subject, first-seen users;
- the same arguments over the same events give the same bytes, and other events another fingerprint;
- CSV can't smuggle a formula; the zip holds the report and a file per section, each with the stated digest;
- a section beyond the bound says how many rows there are;
- unknown types and bad periods are refused with what is right.
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import json
import zipfile
from datetime import UTC, date, datetime, timedelta

import pytest

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.errors import InvalidArgument

TYPES = ("access_log", "gdpr", "hipaa", "pci_dss", "soc2", "sox")
# Sections about the log, its retention or the report's other sections: they answer without events, too.
OF_THE_LOG_ITSELF = {"retention", "log_integrity", "field_coverage", "populations", "criteria"}
DAY = date(2024, 3, 10)


@pytest.fixture
async def audit(migrated_url):
    async with AuditAggregator(migrated_url) as aggregator:
        yield aggregator


async def log(audit, tenant, minute, category, action, **fields):
    moment = datetime(2024, 3, 10, 12, tzinfo=UTC) + timedelta(minutes=minute)
    return await audit.log_event(category, action, tenant_id=tenant, occurred_at=moment, **fields)


@pytest.mark.parametrize("report_type", TYPES)
async def test_an_empty_period_is_told_in_sentences(audit, unique, report_type):
    report = await audit.generate_compliance_report(DAY, DAY, report_type, unique)
    assert report.completeness["events"] == 0
    for section in report.sections:
        assert section.control
        if section.name in OF_THE_LOG_ITSELF:
            assert section.rows
        else:
            assert section.rows == ()
            assert section.note.endswith(".")
    assert all(one.why and one.needed and one.control for one in report.cannot_answer)
    assert report.cannot_answer
    assert report.charts == ()


@pytest.mark.parametrize("report_type", TYPES)
async def test_the_same_question_gives_the_same_bytes(audit, unique, report_type):
    await asyncio.gather(
        *(log(audit, unique, n, "DATA_ACCESS", "user.read", user_id=f"u{n % 3}") for n in range(20)),
        *(log(audit, unique, n, "CONFIGURATION", "change.deploy", user_id="u") for n in range(40)),
    )

    async def ask():
        return await audit.generate_compliance_report(DAY, DAY, report_type, unique)

    first, second = await ask(), await ask()
    assert first.to_json() == second.to_json()
    assert first.to_csv() == second.to_csv()
    await log(audit, unique, 50, "DATA_ACCESS", "user.read", user_id="u")
    third = await ask()
    assert third.completeness["events_sha256"] != first.completeness["events_sha256"]
    assert third.header == first.header
    body = third.to_dict()
    digest = body.pop("body_sha256")
    told = json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    assert hashlib.sha256(told).hexdigest() == digest


async def test_access_log_lists_counts_and_names_the_new(audit, unique):
    await audit.log_event(
        "DATA_ACCESS", "x", user_id="old", tenant_id=unique, occurred_at=datetime(2024, 2, 1, tzinfo=UTC)
    )
    await log(
        audit, unique, 0, "DATA_ACCESS", "user.read", user_id="old", resource_type="user", resource_id="7"
    )
    await log(audit, unique, 61, "DATA_ACCESS", "user.read", user_id="new", metadata={"user_agent": "curl"})
    await log(audit, unique, 62, "AUTHENTICATION", "login.failed", user_id="new", ip_address="10.0.0.7")
    report = await audit.generate_compliance_report(
        start_date=DAY, end_date=DAY, report_type="access_log", tenant_id=unique, time_zone="Europe/Berlin"
    )
    events = report.section("events")
    assert [row[events.columns.index("user")] for row in events.rows] == ["old", "new", "new"]
    assert events.rows[1][events.columns.index("user_agent")] == "curl"
    assert report.section("by_user").rows == (
        ("new", "failure", 1),
        ("new", "success", 1),
        ("old", "success", 1),
    )
    assert [row[0] for row in report.section("by_hour").rows] == [
        "2024-03-10 13:00", "2024-03-10 14:00", "2024-03-10 14:00",
    ]  # fmt: skip
    assert [row[0] for row in report.section("first_seen_user").rows] == ["new"]
    assert [row[0] for row in report.section("first_seen_address").rows] == ["10.0.0.7"]


async def test_sox_finds_who_created_and_approved_and_what_nobody_approved(audit, unique):
    thing = {"resource_type": "payment", "resource_id": "p1"}
    await log(audit, unique, 0, "BUSINESS", "payment.create", user_id="eve", **thing)
    await log(audit, unique, 1, "BUSINESS", "payment.approve", user_id="eve", **thing)
    await log(audit, unique, 2, "BUSINESS", "payment.approve", user_id="bob", **thing)
    change = {"change_id": "c1", "author": "ann"}
    await log(audit, unique, 3, "CONFIGURATION", "change.deploy", metadata={**change, "approver": "bob"})
    await log(audit, unique, 4, "CONFIGURATION", "change.deploy", metadata={**change, "approver": "ann"})
    await log(audit, unique, 5, "CONFIGURATION", "change.deploy", metadata=change)
    report = await audit.generate_compliance_report(DAY, DAY, "sox", unique)
    assert [row[3] for row in report.section("segregation_of_duties").rows] == ["eve"]
    assert report.section("changes").total == 3
    assert report.section("changes_unapproved").total == 2
    assert report.section("changes_sample").total == 3


async def test_gdpr_counts_each_subject_once_and_masks_other_persons(audit, unique):
    for minute, subject in enumerate(["s1", "s1", "s2"]):
        await log(
            audit, unique, minute, "SECURITY", "data.breach", correlation_id="b1",
            metadata={"subject_id": subject, "data_category": "health"},
        )  # fmt: skip
    await log(audit, unique, 9, "DATA_ACCESS", "user.read", user_id="ann", metadata={"subject_id": "s1"})
    await log(audit, unique, 9, "DATA_ACCESS", "user.read", user_id="bob", metadata={"subject_id": "s1"})
    report = await audit.generate_compliance_report(DAY, DAY, "gdpr", unique)
    assert report.section("breach_extent").rows == (("b1", "(all)", 2, 0, 3), ("b1", "health", 2, 0, 3))
    assert report.section("breaches").rows[0][:3] == ("b1", "2024-03-10T12:00:00Z", "2024-03-13T12:00:00Z")
    (row,) = report.section("access_by_subject").rows
    assert row[0] == "s1"
    assert row[5:7] == (2, 2)
    assert "ann" not in json.dumps(report.section("access_by_subject").to_dict())


async def test_hipaa_shows_what_a_disabled_user_did(audit, unique):
    await log(audit, unique, 0, "AUTHENTICATION", "user.login", user_id="mal")
    await log(audit, unique, 1, "ADMINISTRATION", "user.disable", resource_type="user", resource_id="mal")
    await log(audit, unique, 2, "DATA_ACCESS", "record.read", user_id="mal", metadata={"patient_id": "p7"})
    report = await audit.generate_compliance_report(DAY, DAY, "hipaa", unique)
    assert [row[3] for row in report.section("disabled_users").rows] == ["record.read"]
    assert report.section("records_by_patient").rows == (("p7", "mal", "record.read", "success", 1),)


async def test_files_are_safe_and_bear_their_digests(audit, unique, tmp_path):
    evil = '=HYPERLINK("http://x","y")'
    await log(
        audit, unique, 0, "DATA_ACCESS", evil, user_id="+1", resource_type=" @x", resource_id='a,b\n"c"'
    )
    report = await audit.generate_compliance_report(DAY, DAY, "access_log", unique)
    text = report.to_csv()["01_events.csv"]
    names, cells = csv.reader(io.StringIO(text))
    row = dict(zip(names, cells, strict=True))
    assert (row["action"], row["user"], row["resource_type"]) == ("'" + evil, "'+1", "' @x")
    assert row["resource_id"] == 'a,b\n"c"'
    first = report.write(tmp_path / "a.zip").read_bytes()
    assert first == report.write(tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        whole = json.loads(archive.read("report.json"))
        for one in whole["attachments"]:
            assert hashlib.sha256(archive.read(one["file"])).hexdigest() == one["sha256"]
        assert len(archive.namelist()) == len(report.sections) + 2
        for line in archive.read("SHA256SUMS").decode().splitlines():
            digest, name = line.split("  ")
            assert hashlib.sha256(archive.read(name)).hexdigest() == digest
    assert json.loads(report.write(tmp_path / "r.json").read_text()) == report.to_dict()
    with pytest.raises(InvalidArgument, match=r"\.zip"):
        report.write(tmp_path / "r.doc")


async def test_a_section_beyond_the_bound_says_so(audit, unique):
    await asyncio.gather(*(log(audit, unique, n, "DATA_ACCESS", "user.read") for n in range(12)))
    report = await audit.generate_compliance_report(DAY, DAY, "access_log", unique, max_rows=5)
    events = report.section("events")
    assert (len(events.rows), events.total) == (5, 12)
    assert "5 of 12" in events.note
    assert report.section("by_hour").rows == (("2024-03-10 12:00", "success", 12),)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"report_type": "iso"}, "report_type.*access_log, gdpr, hipaa, pci_dss, soc2, sox"),
        ({"report_type": 5}, "report_type"),
        ({"start_date": date(2024, 3, 12)}, "end_date"),
        ({"start_date": "2024-03-10"}, "start_date.*date"),
        ({"end_date": date.max}, "end_date"),
        ({"time_zone": "Mars/Base"}, "time_zone"),
        ({"max_rows": 0}, "max_rows"),
        ({"tenant_id": "\x00"}, "tenant_id"),
    ],
)
async def test_bad_questions_are_refused(audit, wrong, told):
    with pytest.raises(InvalidArgument, match=told):
        await audit.generate_compliance_report(
            **{"start_date": DAY, "end_date": DAY, "report_type": "sox", **wrong}
        )
