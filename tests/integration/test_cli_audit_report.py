"""Promises: `dotmac audit report` gives the same bytes as the library in every form, to a file or to a pipe;
what is wrong ends with exit code 2 and says what is right; a report on one person is filtered to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dotmac.platform.audit_trail import AuditAggregator
from support import story

COMMAND = [sys.executable, "-c", "from dotmac.platform.cli.main import run; run()", "audit", "report"]
PERIOD = ["--from", "2024-03-01", "--to", "2024-03-31"]


@pytest.fixture(scope="module")
def told(migrated_url, run_apart):
    tenant = "story-of-the-command"

    async def work():
        async with AuditAggregator(migrated_url) as audit:
            await story.tell(audit, tenant)

    run_apart(work())
    return tenant


def run(url, *arguments):
    return subprocess.run(
        [*COMMAND, *arguments, "--url", url],
        env={**os.environ, "COLUMNS": "300", "NO_COLOR": "1"},
        capture_output=True,
        timeout=120,
        check=False,
    )


async def test_every_form_is_what_the_library_gives(migrated_url, told, tmp_path):
    async with AuditAggregator(migrated_url) as audit:
        wanted = await audit.generate_compliance_report(story.FIRST, story.LAST, "sox", told, seed="s")
    for form, suffix in (("json", ".json"), ("csv", ".zip"), ("html", ".html"), ("pdf", ".pdf")):
        piped = run(migrated_url, "sox", *PERIOD, "--tenant", told, "--seed", "s", "--format", form)
        assert (piped.returncode, piped.stdout) == (0, wanted.to_bytes(suffix)), piped.stderr
        file = tmp_path / f"r{suffix}"
        done = run(migrated_url, "sox", *PERIOD, "--tenant", told, "--seed", "s", "-o", str(file))
        assert done.returncode == 0, done.stderr
        assert (done.stdout, file.read_bytes()) == (b"", wanted.to_bytes(suffix))
        assert wanted.body_sha256 in done.stderr.decode()


def test_one_person_and_the_record_of_processing(migrated_url, told, tmp_path):
    records = tmp_path / "records.json"
    records.write_text(json.dumps(story.RECORDS))
    done = run(migrated_url, "gdpr", *PERIOD, "--tenant", told, "--subject", "p3", "--records", str(records))
    assert done.returncode == 0, done.stderr
    found = {section["name"]: section for section in json.loads(done.stdout)["sections"]}
    assert found["subject_access"]["rows_total"] > 10
    assert "ann" not in json.dumps(found["subject_access"])
    assert [row[0] for row in found["records_of_processing"]["rows"]] == ["Newsletter", "Patient care"]
    assert {row[0] for row in found["access_by_subject"]["rows"]} == {"p3"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["iso", *PERIOD], "access_log, gdpr, hipaa, pci_dss, soc2, sox"),
        (["sox", "--from", "yesterday", "--to", "2024-03-31"], "--from"),
        (["sox", "--from", "2024-03-31", "--to", "2024-03-01"], "end_date"),
        (["sox", *PERIOD, "--format", "doc"], "json, csv, html, pdf"),
        (["sox", *PERIOD, "-o", "x.doc"], "--output"),
        (["sox", *PERIOD, "--subject", "p"], "gdpr and hipaa"),
        (["gdpr", *PERIOD, "--records", "/missing.json"], "missing.json"),
        (["gdpr", *PERIOD, "--time-zone", "Mars/Base"], "time_zone"),
        (["sox", *PERIOD, "--format", "pdf", "--page-size", "A5"], "letter"),
    ],
)
def test_what_is_wrong_is_told(migrated_url, arguments, says):
    done = run(migrated_url, *arguments)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr.decode()
