"""Subject access (GDPR, article 15) on a real PostgreSQL.

Promises: everything about one subject is there, oldest first and once: what they did, what is theirs, what was
done to them; their personal data decrypted, erased ones said to be; nothing of another tenant; other persons
appear under names that stay the same within an export and nowhere else, and their data not at all; JSON that
parses, HTML in which nothing acts; a summary that agrees; memory that does not grow; a file that only its owner
reads and that is whole or not there; it is logged. The commands do the same.
"""

# ruff: noqa: E501 (tables read best by the line)

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import stat
import subprocess
import sys
import tracemalloc
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import pytest

from dotmac.platform.audit_trail import AuditAggregator, audit_context
from dotmac.platform.errors import InvalidArgument, PersonalKeyMissing

KEY = base64.b64encode(bytes(range(32))).decode()


@pytest.fixture
async def audit(migrated_url):
    async with AuditAggregator(migrated_url, personal_key=KEY, anomaly_detection=False) as aggregator:
        yield aggregator


@pytest.fixture
async def ada(audit, unique):
    """A subject with events of every kind; the names of the others."""
    me, bob, eve = f"ada-{unique}", f"bob-{unique}", f"eve-{unique}"
    started = datetime.now(UTC) - timedelta(hours=1)

    async def log(minute, action, **more):
        category = more.pop("category", "DATA_ACCESS")
        await audit.log_event(category, action, occurred_at=started + timedelta(minutes=minute), **more)

    mine = {"email": "ada@example.com", "age": 36}
    await log(1, "login", category="AUTHENTICATION", user_id=me, ip_address="192.0.2.7", personal=mine,
              metadata={"user_agent": "curl", "purpose": "login"})  # fmt: skip
    await log(2, "record.read", user_id=bob, ip_address="198.51.100.3", resource_type="customer", resource_id=me,
              correlation_id="bobs", metadata={"email": "bob@example.com", "note": f"{bob} asked bob@example.com about ada@example.com from 198.51.100.3", "purpose": "support", "data_category": "contact", "list": [bob, {"user": bob}], "ok": 1})  # fmt: skip
    await log(3, "record.change", user_id=bob, subject_id=me, personal={"phone": "123"})
    await log(4, "record.read", user_id=me, resource_type="user", resource_id=eve, ip_address="192.0.2.7")
    await log(5, "mail.sent", user_id=me, subject_id=eve, personal={"email": "eve@example.com"})
    await log(6, "order.read", user_id=bob, resource_type="order", resource_id=me)
    await log(7, "login", user_id=bob)
    await log(8, "login", user_id=me, tenant_id="other")
    return me, bob, eve


async def test_everything_about_one_subject_and_others_masked(audit, ada):
    me, bob, eve = ada
    found = [entry async for entry in audit.subject_access(me)]
    assert [(entry["action"], entry["role"]) for entry in found] == [
        ("login", "actor"), ("record.read", "resource"), ("record.change", "subject"), ("record.read", "actor"),
        ("mail.sent", "actor"),
    ]  # fmt: skip
    login, read, change, saw, mail = found
    assert login["personal"] == {"email": "ada@example.com", "age": 36}
    assert (login["ip_address"], login["metadata"]["user_agent"]) == ("192.0.2.7", "curl")
    assert change["personal"] == {"phone": "123"}
    assert saw["ip_address"] == "192.0.2.7"
    assert mail["personal"] is None
    names = {read["user_id"], change["user_id"]}
    assert len(names) == 1, "one person, one name"
    assert saw["resource_id"] == mail["subject_id"] != read["user_id"]
    assert (read["ip_address"], read["correlation_id"]) == ("***", None)
    other = read["user_id"]
    assert read["metadata"] == {
        "email": "***", "note": f"{other} asked *** about ada@example.com from ***", "purpose": "support",
        "data_category": "contact", "list": [other, {"user": other}], "ok": 1,
    }  # fmt: skip
    text = json.dumps(found)
    for name in (bob, eve, "bob@", "eve@", "198.51.100.3"):
        assert name not in text
    again = [entry async for entry in audit.subject_access(me)]
    assert again[1]["user_id"] != other, "nothing is learnt from comparing exports"
    assert [
        entry async for entry in audit.subject_access(me, person_types=["order"], end_time=datetime.now(UTC))
    ]
    with audit_context(tenant_id="other"):
        assert [entry["action"] async for entry in audit.subject_access(me)] == ["login"]


async def test_the_export_in_json(audit, ada, tmp_path, unique):
    me, _, _ = ada
    await audit.erase_subject(me, reason="asked", by="dpo")
    await audit.log_event("DATA_ACCESS", "login", user_id=me, personal={"email": "new"})
    file = tmp_path / "ada.json"
    with audit_context(user_id="clerk"):
        summary = await audit.export_subject_access(me, file)
    found = json.loads(file.read_text())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [entry["personal"] for entry in found["events"]] == [
        "erased", None, "erased", None, None, None, {"email": "new"},
    ]  # fmt: skip
    assert found["subject_id"] == me
    assert found["summary"] == summary.to_dict()
    assert (summary.events, summary.erased, summary.masked) == (7, 2, 5)
    assert found["summary"]["purpose"] == {"login": 1, "support": 1}
    assert found["summary"]["personal_fields"] == {"email": 1}
    assert (found["summary"]["first"], found["summary"]["last"]) == (
        found["events"][0]["occurred_at"], found["events"][-1]["occurred_at"],
    )  # fmt: skip
    (logged,) = await audit.query_events(actions="subject.access_exported", resource_id=me)
    assert (logged.user_id, logged.metadata["events"]) == ("clerk", 7)
    stream = io.StringIO()
    await audit.export_subject_access(f"nobody-{unique}", stream)
    assert json.loads(stream.getvalue())["events"] == []


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attributes)

    def handle_data(self, data):
        self.text.append(data)


async def test_the_export_for_people(audit, unique, tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=y>"
    await audit.log_event(
        "DATA_CHANGE", f"{evil}", user_id=unique, resource_id=evil, metadata={evil: evil, "n": [1, {"a": 2}]},
        personal={evil: evil, "when": 5},
    )  # fmt: skip
    file = tmp_path / "me.html"
    await audit.export_subject_access(unique, str(file))
    page = Page()
    page.feed(file.read_text())
    assert page.tags <= {
        *("html", "meta", "title", "style", "h1", "h2", "dl", "dt", "dd", "p"),
        *("table", "thead", "tbody", "tr", "th", "td", "br"),
    }
    assert "".join(page.text).count(evil) == 7
    assert "when: 5" in page.text


async def test_pages_of_many_and_memory(audit, unique, tmp_path):
    rows = 3_500
    for start in range(0, rows, 500):
        await asyncio.gather(
            *(audit.log_event("DATA_ACCESS", f"a{number}", user_id=unique, personal={"n": number}, metadata={"x": "y" * 500})
              for number in range(start, start + 500))
        )  # fmt: skip

    class Count(io.StringIO):
        lines = 0

        def write(self, text):
            self.lines += text.count('"occurred_at"')
            return len(text)

    stream = Count()
    tracemalloc.start()
    summary = await audit.export_subject_access(unique, stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (stream.lines, summary.events) == (rows, rows)
    assert peak < 20 << 20, "pages, not all of it"
    found = [entry async for entry in audit.subject_access(unique)]
    assert found.pop()["action"] == "subject.access_exported"
    assert sorted(entry["personal"]["n"] for entry in found) == list(range(rows))


async def test_whole_or_not_there(migrated_url, audit, unique, tmp_path):
    await audit.log_event("DATA_ACCESS", "x", user_id=unique, personal={"a": 1})
    async with AuditAggregator(migrated_url) as without_key:
        with pytest.raises(PersonalKeyMissing):
            await without_key.export_subject_access(unique, tmp_path / "x.json")
    with pytest.raises(InvalidArgument, match="json"):
        await audit.export_subject_access(unique, tmp_path / "x.docx")
    with pytest.raises(InvalidArgument, match="subject_id"):
        await audit.export_subject_access("", tmp_path / "x.json")
    exporting = asyncio.create_task(audit.export_subject_access(unique, tmp_path / "x.json"))
    await asyncio.sleep(0)
    exporting.cancel()
    await asyncio.wait([exporting])
    assert list(tmp_path.iterdir()) == []


def test_the_commands(postgres_database, unique, tmp_path, run_apart):
    environment = {
        **os.environ,
        "DATABASE_URL": postgres_database,
        "AUDIT_TRAIL_PERSONAL_KEY": KEY,
        "NO_COLOR": "1",
    }

    def dotmac(*arguments, code=0, **more):
        done = subprocess.run(
            [sys.executable, "-c", "from dotmac.platform.cli.main import run; run()", "audit", *arguments],
            env={**environment, **more}, capture_output=True, text=True, timeout=60, check=False, input="n\n",
        )  # fmt: skip
        assert done.returncode == code, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    async def log():
        async with AuditAggregator(postgres_database, personal_key=KEY) as audit:
            await audit.migrate()
            await audit.log_event("DATA_ACCESS", "x", user_id=unique, personal={"a": "clear"})

    run_apart(log())
    shown = json.loads(dotmac("subject-access", unique).stdout)
    assert shown["events"][0]["personal"] == {"a": "clear"}
    assert "2 events" in dotmac("subject-access", unique, "-o", str(tmp_path / "a.html")).stderr
    assert "clear" in (tmp_path / "a.html").read_text()

    erase = ("erase-subject", unique, "--reason", "asked", "--by", "dpo")
    assert "Destroy the key" in dotmac(*erase, code=1).stderr
    assert "1 fields of 1 events" in dotmac(*erase, "--yes").stdout
    assert "already by dpo" in dotmac(*erase, "--yes").stdout
    assert json.loads(dotmac(*erase, "--yes", "--json").stdout)["new"] is False
    nobody = dotmac("erase-subject", f"{unique}-x", "--reason", "r", "--by", "b", "--yes").stdout
    assert "nothing to erase" in nobody
    assert json.loads(dotmac("subject-access", unique).stdout)["events"][0]["personal"] == "erased"

    new = dotmac("new-personal-key").stdout.strip()
    assert len(base64.b64decode(new)) == 32
    assert (
        "AUDIT_TRAIL_PERSONAL_KEY"
        in dotmac("rotate-personal-key", code=1, AUDIT_TRAIL_PERSONAL_KEY="").stderr
    )
    assert json.loads(dotmac("rotate-personal-key", "--json").stdout)["rewrapped"] >= 0
