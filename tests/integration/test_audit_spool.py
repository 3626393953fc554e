"""Events that wait on the local disk.

Promises, each with a count of what was taken against what is found:
- `log_event(wait=False)` returns while the database is away, and what it took is stored once it is back, in
  the order of the calls, with progress in the log; aclose() stores what waits, or leaves it for the next;
- events of a process that was killed are stored by the next, exactly once, also where it was killed between
  storing and forgetting them, and where two processes drain the same folder at once;
- a full spool holds callers up, then gives a typed error; so does a full disk, and what it refused is not
  stored; a folder that can't be written to is told;
- an event that the database does not take is put aside, and holds up no other;
- several loops, and a forked child, have files of their own; nobody else can read them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import asyncpg
import pytest

from dotmac.platform.audit_trail import AuditAggregator, AuditTrailConfig
from dotmac.platform.audit_trail import spool as spooling
from dotmac.platform.audit_trail.spool_file import SpoolFile, others
from dotmac.platform.errors import EngineClosed, SpoolFailed, SpoolFull
from support.threads import in_threads

PRODUCER = """
import asyncio, os, sys
from pathlib import Path
from dotmac.platform.audit_trail import AuditAggregator, AuditTrailConfig

async def main(url, folder, tenant, count, signal_at):
    audit = AuditAggregator(url, config=AuditTrailConfig(spool_path=Path(folder)))
    for number in range(int(count)):
        made = await audit.log_event("SECURITY", f"n{number}", tenant_id=tenant, wait=False)
        print(made, flush=True)
    await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "spool"


def make(url, folder, **more):
    return AuditAggregator(url, config=AuditTrailConfig(spool_path=folder, **more))


async def stored(url, tenant):
    """Ids in the order in which they were stored."""
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch(
            "SELECT event.id, segment.root FROM audit_events AS event LEFT JOIN audit_segments AS segment "
            "ON segment.id = event.segment WHERE event.tenant_id = $1 "
            "ORDER BY segment.recorded_tx, event.leaf",
            tenant,
        )
        assert all(row["root"] for row in rows)
        return [row["id"] for row in rows]
    finally:
        await connection.close()


async def until(condition, seconds=30):
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


async def test_taken_while_the_database_is_away_and_stored_in_order(migrated_server, unique, folder, caplog):
    caplog.set_level(logging.INFO, "dotmac")
    async with make(migrated_server.url, folder, timeout=1) as audit:
        await audit.log_event("SECURITY", "first", tenant_id=f"{unique}x")
        await asyncio.to_thread(migrated_server.kill)
        try:
            taken = [
                await audit.log_event("SECURITY", f"n{number}", tenant_id=unique, wait=False)
                for number in range(300)
            ]
            taken += await asyncio.gather(
                *(audit.log_event("SECURITY", "x", tenant_id=unique, wait=False) for _ in range(3_000))
            )
            assert all(path.stat().st_mode & 0o077 == 0 for path in files(folder))
            await until(lambda: asyncio.sleep(0, "wait for the database" in caplog.text))
        finally:
            await asyncio.to_thread(migrated_server.restart)

        # Nothing more is logged: it comes back by itself.
        async def all_there():
            return len(await stored(migrated_server.url, unique)) == 3_300

        await until(all_there)
    assert await stored(migrated_server.url, unique) == taken
    assert "0 to go" in caplog.text
    assert files(folder) == []


async def test_closing_leaves_to_the_next_what_the_database_does_not_take(
    migrated_server, unique, folder, caplog
):
    await asyncio.to_thread(migrated_server.kill)
    try:
        async with make(migrated_server.url, folder, timeout=1) as audit:
            taken = [await audit.log_event("SECURITY", "x", tenant_id=unique, wait=False) for _ in range(50)]
        assert "50 events wait in the audit spool" in caplog.text
    finally:
        await asyncio.to_thread(migrated_server.restart)
    async with make(migrated_server.url, folder) as audit:
        taken.append(await audit.log_event("SECURITY", "y", tenant_id=unique, wait=False))

        async def all_there():
            return len(await stored(migrated_server.url, unique)) == 51

        await until(all_there)
    assert sorted(await stored(migrated_server.url, unique)) == sorted(taken)
    assert files(folder) == []


def killed_producer(url, folder, tenant, count):
    """Ids that a process was told that they are kept, before it was killed."""
    producer = subprocess.Popen(
        [sys.executable, "-c", PRODUCER, url, str(folder), tenant, "100000", "0"], stdout=subprocess.PIPE
    )
    try:
        told = [producer.stdout.readline().decode().strip() for _ in range(count)]
    finally:
        producer.send_signal(signal.SIGKILL)
        told += producer.stdout.read().decode().split("\n")[:-1]  # whole lines alone
        producer.wait()
        producer.stdout.close()
    return told


async def test_killed_processes_and_two_that_drain_at_once(migrated_server, unique, folder):
    await asyncio.to_thread(migrated_server.pause)
    try:
        told = []
        for _ in range(3):
            told += await asyncio.to_thread(killed_producer, migrated_server.url, folder, unique, 100)
    finally:
        await asyncio.to_thread(migrated_server.resume)
    assert len(told) >= 300
    assert len(list(folder.rglob("*.sqlite"))) == 3
    # Each of them drains whatever it finds.
    both = [make(migrated_server.url, folder) for _ in range(2)]
    others_ = [
        subprocess.Popen(
            [sys.executable, "-c", PRODUCER, migrated_server.url, str(folder), f"{unique}other", "1", "0"],
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    try:
        for audit in both:
            await audit.log_event("SECURITY", "x", tenant_id=f"{unique}x")

        async def all_there():
            return len(await stored(migrated_server.url, unique)) >= len(told)

        await until(all_there, 60)
    finally:
        for other in others_:
            other.kill()
            other.wait()
            other.stdout.close()
        for audit in both:
            await audit.aclose()
    found = [str(one) for one in await stored(migrated_server.url, unique)]
    assert len(found) == len(set(found))
    # One that was kept, but whose caller was killed before it could tell, is stored too.
    assert set(told) <= set(found)
    assert len(found) - len(told) <= 3


async def test_stored_but_not_forgotten_is_stored_once(migrated_server, unique, folder, monkeypatch):
    removed = SpoolFile.remove
    monkeypatch.setattr(SpoolFile, "remove", lambda *_: (_ for _ in ()).throw(SpoolFailed("killed here")))
    monkeypatch.setattr(spooling, "backoff", lambda _: 0.01)
    async with make(migrated_server.url, folder, timeout=1) as audit:
        taken = [await audit.log_event("SECURITY", "x", tenant_id=unique, wait=False) for _ in range(20)]

        async def all_there():
            return len(await stored(migrated_server.url, unique)) == 20

        await until(all_there)
    monkeypatch.setattr(SpoolFile, "remove", removed)
    assert len(list(folder.rglob("*.sqlite"))) == 1
    async with make(migrated_server.url, folder) as audit:
        await audit.log_event("SECURITY", "x", tenant_id=f"{unique}x")
        await until(lambda: asyncio.sleep(0, not list(folder.rglob("*.sqlite"))))
    assert await stored(migrated_server.url, unique) == taken


async def test_a_full_spool_holds_up_and_then_says_so(migrated_server, unique, folder):
    async with make(migrated_server.url, folder, timeout=1, spool_max_events=10) as audit:
        await asyncio.to_thread(migrated_server.pause)
        try:
            taken = [await audit.log_event("SECURITY", "x", tenant_id=unique, wait=False) for _ in range(10)]
            with pytest.raises(SpoolFull, match="10 events wait") as told:
                await audit.log_event("SECURITY", "x", tenant_id=unique, wait=False)
            assert told.value.retryable
            late = asyncio.create_task(audit.log_event("SECURITY", "x", tenant_id=unique, wait=False))
            await asyncio.sleep(0.1)
        finally:
            await asyncio.to_thread(migrated_server.resume)
        taken.append(await late)
    assert await stored(migrated_server.url, unique) == taken


FULL_DISK = """
import asyncio, json, resource, sys
from pathlib import Path
from dotmac.platform.audit_trail import AuditAggregator, AuditTrailConfig
from dotmac.platform.errors import SpoolFull

async def main(url, folder, tenant):
    audit = AuditAggregator(url, config=AuditTrailConfig(spool_path=Path(folder), timeout=1))
    kept, refused = [], 0
    for number in range(200):
        if number == 20:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        if number == 180:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        try:
            kept.append(str(await audit.log_event(
                "SECURITY", "x", tenant_id=tenant, metadata={"text": "x" * 5_000}, wait=False)))
        except SpoolFull as error:
            assert "full" in str(error), error
            refused += 1
    print(json.dumps([kept, refused]), flush=True)
    await audit.aclose()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_full_disk_is_told_and_what_was_kept_is_stored(migrated_server, unique, folder):
    await asyncio.to_thread(migrated_server.pause)
    try:
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", FULL_DISK, migrated_server.url, str(folder), unique],
            capture_output=True,
            timeout=60,
            check=False,
        )
    finally:
        await asyncio.to_thread(migrated_server.resume)
    assert done.returncode == 0, done.stderr.decode()
    kept, refused = json.loads(done.stdout)
    assert refused > 0
    assert len(kept) + refused == 200
    assert len(kept) >= 40  # before, and after there was room again
    async with make(migrated_server.url, folder) as audit:
        await audit.log_event("SECURITY", "x", tenant_id=f"{unique}x")

        async def all_there():
            return len(await stored(migrated_server.url, unique)) >= len(kept)

        await until(all_there)
    assert [str(one) for one in await stored(migrated_server.url, unique)] == kept


async def test_a_folder_that_cannot_be_made_is_told(migrated_server, tmp_path):
    (tmp_path / "file").write_text("")
    async with make(migrated_server.url, tmp_path / "file") as audit:
        with pytest.raises(SpoolFailed, match="file"):
            await audit.log_event("SECURITY", "x", wait=False)


async def test_an_unexpected_error_is_told_and_the_room_given_back(
    migrated_server, unique, folder, monkeypatch
):
    async with make(migrated_server.url, folder) as audit:
        await audit.log_event("SECURITY", "x", tenant_id=f"{unique}x")
        spool = (await audit._state()).spool

        def no_thread(_):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", no_thread)
            for _ in range(2):
                with pytest.raises(SpoolFailed, match="can't start new thread"):
                    await audit.log_event("SECURITY", "refused", tenant_id=unique, wait=False)
        with monkeypatch.context() as patched:
            patched.setattr(SpoolFile, "append", lambda *_: 1 / 0)
            with pytest.raises(SpoolFailed, match="ZeroDivisionError"):
                await audit.log_event("SECURITY", "refused", tenant_id=unique, wait=False)
        assert (spool.events, spool.bytes) == (0, 0)
        first = SpoolFile.first
        errors = [sqlite3.ProgrammingError("odd"), ZeroDivisionError("odd")]

        def fails_at_first(*arguments):
            if errors:
                raise errors.pop()
            return first(*arguments)

        monkeypatch.setattr(SpoolFile, "first", fails_at_first)
        kept = await audit.log_event("SECURITY", "kept", tenant_id=unique, wait=False)

        async def there():
            return await stored(migrated_server.url, unique) == [kept]

        await until(there)
    assert errors == []
    assert await stored(migrated_server.url, unique) == [kept]


async def test_who_waits_for_room_at_the_end_is_told(migrated_server, unique, folder, monkeypatch):
    monkeypatch.setattr(spooling.Spool, "_drain_own", lambda _: asyncio.sleep(0))
    audit = make(migrated_server.url, folder, spool_max_events=1, timeout=5)
    await audit.log_event("SECURITY", "x", tenant_id=unique, wait=False)
    waiting = asyncio.create_task(audit.log_event("SECURITY", "y", tenant_id=unique, wait=False))
    await asyncio.sleep(0.1)
    async with asyncio.timeout(3):
        await audit.aclose()
        with pytest.raises(EngineClosed):
            await waiting


async def test_a_file_adopted_for_nobody_is_let_go(migrated_server, unique, folder, monkeypatch):
    audit = make(migrated_server.url, folder)
    await audit.log_event("SECURITY", "x", tenant_id=unique, wait=False)
    spool = (await audit._state()).spool
    path = folder / "1-left.sqlite"
    SpoolFile(path, os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)).close()
    path.touch()
    adopt, begun, go_on = SpoolFile.adopt, threading.Event(), threading.Event()

    def slow(path):
        begun.set()
        go_on.wait(5)
        return adopt(path)

    monkeypatch.setattr(SpoolFile, "adopt", slow)
    adopting = asyncio.create_task(spool._adopt(path))
    await asyncio.to_thread(begun.wait)
    adopting.cancel()
    await asyncio.wait([adopting])
    go_on.set()
    await audit.aclose()
    monkeypatch.undo()
    path.touch()

    async def adopted():
        file = SpoolFile.adopt(path)
        if file is not None:
            file.close()
        return file is not None

    await until(adopted, 5)


async def test_what_the_database_does_not_take_is_put_aside(migrated_server, unique, folder, caplog):
    connection = await asyncpg.connect(migrated_server.url)
    try:
        await connection.execute(
            f"ALTER TABLE audit_events ADD CONSTRAINT {unique} CHECK (action <> '{unique}') NOT VALID"
        )
        async with make(migrated_server.url, folder, timeout=5) as audit:
            taken = []
            for action in ("a", unique, "b"):
                made = await audit.log_event("SECURITY", action, tenant_id=unique, wait=False)
                taken.append(made)

            async def two_there():
                return len(await stored(migrated_server.url, unique)) == 2

            await until(two_there)
        assert await stored(migrated_server.url, unique) == [taken[0], taken[2]]
        assert "put aside" in caplog.text
        [path] = folder.rglob("*.sqlite")
        with sqlite3.connect(path) as database:
            assert database.execute("SELECT count(*) FROM refused").fetchone() == (1,)
        database.close()
    finally:
        await connection.execute(f"ALTER TABLE audit_events DROP CONSTRAINT {unique}")
        await connection.close()


@pytest.mark.parametrize("kept", [True, False])
def test_a_loop_that_ended_without_a_word_leaves_its_file(migrated_server, unique, folder, monkeypatch, kept):
    monkeypatch.setattr(spooling, "LOOK_EVERY", 0.2)
    audit = make(migrated_server.url, folder)

    async def spool_and_end():
        (await audit._state()).spool._drain_own = lambda: asyncio.sleep(0)
        return await audit.log_event("SECURITY", "x", tenant_id=unique, wait=False)

    def new_loop(work):
        loop = asyncio.new_event_loop()
        try:
            return loop.run_until_complete(work())
        finally:
            loop.close()  # neither tasks nor asynchronous generators are ended before

    async def next_one(audit):
        async with audit:
            await audit.log_event("SECURITY", "y", tenant_id=f"{unique}y", wait=False)

            async def there():
                return await stored(migrated_server.url, unique) == [event_id]

            await until(there, 10)

    event_id = new_loop(spool_and_end)
    # By the same aggregator, which lets go of the ended loop, or by another of the same process.
    asyncio.run(next_one(audit if kept else make(migrated_server.url, folder)))
    assert files(folder) == []


def test_several_loops_and_a_forked_child(migrated_server, unique, folder):
    audit = make(migrated_server.url, folder)
    taken = []

    async def some(count=20):
        ids = [await audit.log_event("SECURITY", "x", tenant_id=unique, wait=False) for _ in range(count)]
        taken.extend(ids)

    assert in_threads(2, some) == []
    with asyncio.Runner() as runner:
        runner.run(some())
        child = os.fork()
        if child == 0:
            status = 1
            try:
                asyncio.events._set_running_loop(None)
                asyncio.run(some(7))
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        runner.run(some())
    assert len(asyncio.run(stored(migrated_server.url, unique))) == len(taken) + 7 == 87
    assert files(folder) == []


def test_a_file_is_its_owners_alone(folder):
    folder.mkdir()
    ours = SpoolFile.new(folder)
    assert others(folder) == []
    ask = (
        "import sys; from pathlib import Path; from dotmac.platform.audit_trail.spool_file import *;"
        "[path] = others(Path(sys.argv[1])); file = SpoolFile.adopt(path); print(file is None);"
        "file and file.close()"
    )

    def asked():
        done = subprocess.run([sys.executable, "-c", ask, folder], capture_output=True, check=True)
        return done.stdout.decode().strip()

    ours.append([b"x"])
    assert asked() == "True"
    assert stat.S_IMODE(ours.path.stat().st_mode) == 0o600
    ours.close()
    assert asked() == "False"
    assert SpoolFile.adopt(ours.path).first(10, 1 << 20)[0].row == b"x"
    assert SpoolFile.adopt(ours.path) is None  # this process has it already
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert Path(ours.path).exists()
