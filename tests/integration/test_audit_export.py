"""Exports of a real database, and reading them back.

Promises:
- every format holds the events of the query, each once, in its order, as `query_events` gives them; `.gz` and
  `.zst` are streams that other tools read; the summary's rows, bytes, SHA-256 and times are the file's;
- what is committed while an export runs is not in it, also where it is resumed later;
- cancelled or failed in the middle, nothing stands under the export's name; the same call goes on behind
  what was complete and gives the very bytes of an undisturbed run; without `resume`, nothing is left at all;
- a connection that is cut in the middle, again and again, changes nothing;
- streams of bytes and of text, async ones, and URLs of fsspec take exports; wrong arguments are refused by
  name;
- memory does not grow with the rows.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import random
import subprocess
import sys
import zlib
from datetime import datetime
from uuid import UUID

import asyncpg
import fsspec
import pyarrow.parquet
import pytest

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.audit_trail.exports import outputs, source
from dotmac.platform.errors import AuditUnavailable, ExportFailed, InvalidArgument
from support.exports import audit_connection, dicts, fill, forget, like, read, unpacked
from support.postgres import PostgresProxy


@pytest.fixture
async def audit(migrated_url):
    async with AuditAggregator(migrated_url) as aggregator:
        yield aggregator


@pytest.fixture
def small_statements(monkeypatch):
    monkeypatch.setattr(source, "ROWS_PER_STATEMENT", 50)


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize(
    "name", ["e.json", "e.ndjson", "e.csv", "e.parquet", "e.json.gz", "e.ndjson.zst", "e.csv.gz", "e.jsonl"]
)
async def test_a_file_holds_the_events_of_the_query(audit, unique, tmp_path, name, order, small_statements):
    await fill(audit, unique, 230)
    await fill(audit, unique + "other", 3)
    place = tmp_path / name
    seen = []
    made = await audit.export_events(place, tenant_id=unique, order=order, progress=seen.append)
    wanted = await dicts(audit, unique, order)
    found = [{name: row[name] for name in wanted[0]} for row in read(place, made.format)]
    assert found == wanted
    assert (made.rows, made.size) == (230, place.stat().st_size)
    assert made.sha256 == hashlib.sha256(place.read_bytes()).hexdigest()
    assert made.first.isoformat(timespec="microseconds") == wanted[0]["occurred_at"]
    assert made.last.isoformat(timespec="microseconds") == wanted[-1]["occurred_at"]
    assert (made.resumed_rows, made.started_over) == (0, None)
    assert seen[-1].rows == 230
    assert [one.rows for one in seen] == sorted(one.rows for one in seen)
    assert list(tmp_path.iterdir()) == [place]
    json.dumps(made.to_dict())


async def test_an_empty_export_is_a_whole_file(audit, unique, tmp_path):
    for name, text in (("e.json", "[\n]\n"), ("e.ndjson", ""), ("e.ndjson.gz", None)):
        made = await audit.export_events(tmp_path / name, tenant_id=unique)
        assert (made.rows, made.first, made.last) == (0, None, None)
        if text is not None:
            assert (tmp_path / name).read_text() == text
    assert (await audit.export_events(tmp_path / "e.csv", tenant_id=unique)).rows == 0
    assert (tmp_path / "e.csv").read_bytes().startswith(b"id,occurred_at,recorded_at,category,action,")
    await audit.export_events(tmp_path / "e.parquet", tenant_id=unique)
    assert pyarrow.parquet.read_table(tmp_path / "e.parquet").num_rows == 0
    await audit.export_events(tmp_path / "e.pdf", tenant_id=unique)
    assert (tmp_path / "e.pdf").read_bytes().startswith(b"%PDF-")


async def test_the_types_of_parquet(audit, unique, tmp_path):
    await fill(audit, unique, 3)
    await audit.export_events(tmp_path / "e.parquet", tenant_id=unique)
    schema = pyarrow.parquet.read_schema(tmp_path / "e.parquet")
    assert str(schema.field("occurred_at").type) == "timestamp[us, tz=UTC]"
    assert str(schema.field("anomaly_score").type) == "double"
    assert str(schema.field("metadata").type) == "string"
    assert str(schema.field("anomaly_reasons").type).startswith("list<")
    assert not schema.field("id").nullable
    assert schema.field("user_id").nullable


async def test_a_pdf_shows_the_events(audit, unique, tmp_path):
    pypdf = pytest.importorskip("pypdf")
    await fill(audit, unique, 400)
    made = await audit.export_events(tmp_path / "e.pdf", tenant_id=unique)
    pages = pypdf.PdfReader(tmp_path / "e.pdf").pages
    text = "\n".join(page.extract_text() for page in pages)
    assert made.rows == 400
    assert len(pages) > 3
    assert text.count("data_access") == 400
    assert "10.0.117.7" in text
    assert unique in text


async def test_later_commits_are_not_in_it(audit, unique, tmp_path, small_statements):
    await fill(audit, unique, 120)
    before = await dicts(audit, unique)
    open_transaction = await asyncpg.connect(audit._postgres_url)
    await open_transaction.execute("BEGIN")
    await open_transaction.execute(
        "INSERT INTO audit_events (occurred_at, id, category, action, level, outcome, tenant_id) "
        "VALUES (now(), gen_random_uuid(), 'system', 'late', 'info', 'success', $1)",
        unique,
    )
    task = None
    tasks = []

    def progress(done):
        nonlocal task
        if task is None:
            # Committed while the export runs, but happened at the end of what it reads.
            task = asyncio.ensure_future(audit.log_event("SYSTEM", "late", tenant_id=unique))
            tasks.append(asyncio.ensure_future(open_transaction.execute("COMMIT")))

    class Slow(io.BytesIO):
        async def write(self, data):
            await asyncio.sleep(0.02)
            return super().write(data)

    held = Slow()
    made = await audit.export_events(held, "ndjson", tenant_id=unique, progress=progress)
    await asyncio.gather(task, *tasks)
    await open_transaction.close()
    assert made.rows == 120
    assert like(held.getvalue(), before)
    assert len(await dicts(audit, unique)) == 122


class StopError(Exception):
    pass


def stopping(after):
    def progress(done):
        if done.rows >= after:
            raise StopError

    return progress


@pytest.mark.parametrize("name", ["e.json", "e.ndjson", "e.csv", "e.ndjson.gz", "e.csv.zst", "e.ndjson.zst"])
async def test_an_interrupted_export_goes_on(audit, unique, tmp_path, name, small_statements):
    await fill(audit, unique, 230)
    whole = tmp_path / f"whole-{name}"
    await audit.export_events(whole, tenant_id=unique)
    place = tmp_path / name
    for stop in (120, 180):
        with pytest.raises(StopError):
            await audit.export_events(place, tenant_id=unique, progress=stopping(stop))
        assert not place.exists()
        await audit.log_event("SYSTEM", "later", tenant_id=unique)  # not in it, whenever it is finished
    made = await audit.export_events(place, tenant_id=unique)
    assert (made.rows, made.resumed_rows, made.started_over) == (230, 150, None)
    assert made.sha256 == hashlib.sha256(place.read_bytes()).hexdigest()
    assert unpacked(place) == unpacked(whole)
    assert made.first == min(datetime.fromisoformat(one["occurred_at"]) for one in read(place, made.format))
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted([name, whole.name])


async def test_another_query_does_not_go_on_with_a_file(audit, unique, tmp_path, small_statements):
    await fill(audit, unique, 120)
    place = tmp_path / "e.ndjson"

    async def interrupt():
        with pytest.raises(StopError):
            await audit.export_events(place, tenant_id=unique, progress=stopping(110))

    await interrupt()
    made = await audit.export_events(place, tenant_id=unique, user_id="u1")
    assert made.resumed_rows == 0
    assert "another export" in made.started_over
    for spoil, why in (
        (lambda: (tmp_path / "e.ndjson.partial").write_text("x" * 200_000), "not the one"),
        (lambda: (tmp_path / "e.ndjson.partial.json").write_text("{"), "can't be read"),
        (lambda: __import__("os").utime(tmp_path / "e.ndjson.partial.json", (0, 0)), "older"),
    ):
        await interrupt()
        spoil()
        made = await audit.export_events(place, tenant_id=unique)
        assert (made.rows, made.resumed_rows) == (120, 0)
        assert why in made.started_over
        assert len(place.read_text().splitlines()) == 120


@pytest.mark.parametrize("name", ["e.ndjson", "e.parquet", "e.csv.gz", "e.pdf"])
async def test_cancelled_in_the_middle_no_half_file_is_left(audit, unique, tmp_path, name, small_statements):
    await fill(audit, unique, 230)
    place = tmp_path / name
    chance = random.Random(5)
    place.write_text("the export of yesterday")
    for resume in (True, False):
        for _ in range(12):
            task = None
            stop = chance.randrange(1, 231)

            def progress(done, stop=stop):
                if done.rows >= stop:
                    task.cancel()  # noqa: B023 (of this round)

            task = asyncio.ensure_future(
                audit.export_events(place, tenant_id=unique, progress=progress, resume=resume)
            )
            await asyncio.wait({task})
            if task.cancelled():
                assert place.read_text() == "the export of yesterday"
            else:
                task.result()
                place.write_text("the export of yesterday")
            left = {one.name for one in tmp_path.iterdir()} - {name}
            assert left <= ({f"{name}.partial", f"{name}.partial.json"} if resume else set())
            if left:
                note = json.loads((tmp_path / f"{name}.partial.json").read_text())
                assert (tmp_path / f"{name}.partial").stat().st_size == note["size"]
    made = await audit.export_events(place, tenant_id=unique)
    assert made.rows == 230


async def test_a_killed_process_leaves_what_the_next_goes_on_with(audit, unique, tmp_path):
    await fill(audit, unique, 400)
    place = tmp_path / "e.ndjson"
    program = (
        "import asyncio, os, sys\n"
        "from dotmac.platform.audit_trail import AuditAggregator\n"
        "from dotmac.platform.audit_trail.exports import source\n"
        "source.ROWS_PER_STATEMENT = 50\n"
        "def stop(done):\n"
        "    if done.rows > 240: os.kill(os.getpid(), 9)\n"
        "async def main():\n"
        "    async with AuditAggregator(sys.argv[1]) as audit:\n"
        "        await audit.export_events(sys.argv[2], tenant_id=sys.argv[3], progress=stop)\n"
        "asyncio.run(main())\n"
    )
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program, audit._postgres_url, str(place), unique], check=False
    )
    assert done.returncode == -9
    assert not place.exists()
    made = await audit.export_events(place, tenant_id=unique)
    assert (made.rows, made.resumed_rows) == (400, 200)
    assert like(place.read_text(), await dicts(audit, unique))


async def test_connections_cut_in_the_middle_change_nothing(audit, unique, tmp_path):
    await fill(audit, unique, 3000)
    wanted = await dicts(audit, unique)
    async with PostgresProxy(audit._postgres_url) as proxy:

        def cut(_done):
            if proxy.lost < 4:  # what comes next is lost, and its connection with it
                proxy.lose_answer(b"record.read")

        async with AuditAggregator(proxy.url, timeout=20) as cut_off:
            await cut_off.ping()
            held = io.BytesIO()
            made = await cut_off.export_events(held, "ndjson", tenant_id=unique, progress=cut)
            assert made.rows == 3000
            assert proxy.lost >= 1  # how often it is told of progress depends on the machine
            assert like(held.getvalue(), wanted)


async def test_a_database_that_is_away_is_told_in_time(unique, tmp_path, unused_tcp_port):
    async with AuditAggregator(f"postgresql://u:p@127.0.0.1:{unused_tcp_port}/d", timeout=1) as audit:
        with pytest.raises(AuditUnavailable, match="1 s"):
            await audit.export_events(tmp_path / "e.csv")
    assert list(tmp_path.iterdir()) == []


async def test_two_exports_do_not_write_one_file(audit, unique, tmp_path, small_statements):
    await fill(audit, unique, 230)
    place = tmp_path / "e.ndjson"
    second = []

    def progress(done):
        if not second:
            second.append(asyncio.ensure_future(audit.export_events(place, tenant_id=unique)))

    await audit.export_events(place, tenant_id=unique, progress=progress)
    try:
        await second[0]
    except InvalidArgument as error:
        assert "another export" in str(error)
    assert len(place.read_text().splitlines()) == 230


async def test_a_full_disk_is_told(audit, unique, tmp_path, monkeypatch):
    await fill(audit, unique, 30)

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs.FileOutput, "_put", full)
    with pytest.raises(ExportFailed, match=r"e\.csv can't be written: No space left"):
        await audit.export_events(tmp_path / "e.csv", tenant_id=unique)
    assert list(tmp_path.iterdir()) == []


async def test_streams_of_every_kind(audit, unique, tmp_path):
    await fill(audit, unique, 40)
    wanted = await dicts(audit, unique)

    class Async:
        def __init__(self):
            self.got = b""

        async def write(self, data):
            await asyncio.sleep(0)
            self.got += data

    held, text, other = io.BytesIO(), io.StringIO(), Async()
    for stream in (held, text, other):
        made = await audit.export_events(stream, "ndjson", tenant_id=unique)
        assert made.rows == 40
    for got in (held.getvalue(), text.getvalue(), other.got):
        assert like(got, wanted)
    assert not held.closed
    packed = io.BytesIO()
    made = await audit.export_events(packed, "csv", tenant_id=unique, compression="gzip")
    assert made.sha256 == hashlib.sha256(packed.getvalue()).hexdigest()
    assert zlib.decompress(packed.getvalue(), 31).count(b"\r\n") == 41
    whole = io.BytesIO()
    await audit.export_events(whole, "parquet", tenant_id=unique)
    whole.seek(0)
    assert (await audit.import_events(whole, "parquet")).present == 40
    packed.seek(0)
    assert (await audit.import_events(packed, "csv", compression="gzip")).present == 40

    class Broken:
        def write(self, data):
            raise BrokenPipeError("reader went away")

    with pytest.raises(BrokenPipeError, match="reader went away"):
        await audit.export_events(Broken(), "ndjson", tenant_id=unique)


async def test_urls_of_fsspec(audit, unique):
    await fill(audit, unique, 40)
    url = f"memory://{unique}/folder/e.ndjson.gz"
    made = await audit.export_events(url, tenant_id=unique)
    files = fsspec.filesystem("memory")
    assert hashlib.sha256(files.cat(f"/{unique}/folder/e.ndjson.gz")).hexdigest() == made.sha256
    assert [one["name"] for one in files.ls(f"/{unique}/folder")] == [f"/{unique}/folder/e.ndjson.gz"]
    assert (await audit.import_events(url)).present == 40

    with pytest.raises(StopError):
        await audit.export_events(f"memory://{unique}/b.csv", tenant_id=unique, progress=stopping(1))
    assert not files.exists(f"/{unique}/b.csv")
    with pytest.raises(InvalidArgument, match="path.*nothing"):
        await audit.export_events("nothing://here/e.csv", tenant_id=unique)


async def test_wrong_arguments_are_refused_by_name(audit, tmp_path):
    for arguments, match in (
        ((tmp_path / "e.xml",), r"format.*json, ndjson, csv, parquet, pdf, ocsf"),
        ((tmp_path / "e.csv", "yaml"), "format"),
        ((7, "csv"), "path_or_stream"),
        ((tmp_path, "csv"), "directory"),
        ((tmp_path / "none" / "e.csv",), "no such directory"),
        ((io.StringIO(), "parquet"), "bytes"),
        ((tmp_path / "e.parquet.gz",), "compressed in itself"),
    ):
        with pytest.raises(InvalidArgument, match=match):
            await audit.export_events(*arguments)
    with pytest.raises(InvalidArgument, match="compression"):
        await audit.export_events(tmp_path / "e.csv", compression="rar")
    with pytest.raises(InvalidArgument, match="compression"):
        await audit.export_events(io.StringIO(), "csv", compression="gzip")
    with pytest.raises(InvalidArgument, match="colour"):
        await audit.export_events(tmp_path / "e.csv", colour="red")
    with pytest.raises(InvalidArgument, match="readable file"):
        await audit.import_events(tmp_path / "none.csv")
    with pytest.raises(InvalidArgument, match="format"):
        await audit.import_events(tmp_path / "e.pdf")
    with pytest.raises(InvalidArgument, match="path_or_stream"):
        await audit.import_events(7, "csv")
    assert list(tmp_path.iterdir()) == []


async def test_events_from_another_cluster_are_not_left_out(audit, unique, tmp_path):
    """A dump restored into a young cluster bears transactions that this one has not reached."""
    async with audit_connection(audit) as connection:
        await connection.execute(
            "INSERT INTO audit_events "
            "(occurred_at, id, recorded_tx, category, action, level, outcome, tenant_id) "
            "VALUES (now(), $2, 1::bigint << 40, 'system', 'moved', 'info', 'success', $1)",
            unique,
            UUID(int=random.getrandbits(128)),
        )
        try:
            await fill(audit, unique, 5)
            assert (await audit.export_events(tmp_path / "e.csv", tenant_id=unique)).rows == 6
        finally:
            await forget(audit, unique)


@pytest.mark.slow
async def test_memory_does_not_grow_with_the_rows(postgres_database, tmp_path):
    async with AuditAggregator(postgres_database) as audit:
        await audit.migrate()
    connection = await asyncpg.connect(postgres_database)
    await connection.execute(
        "INSERT INTO audit_events (occurred_at, id, category, action, level, outcome, user_id, metadata) "
        "SELECT now() - n * interval '1 millisecond', gen_random_uuid(), 'system', 'x', 'info', 'success', "
        "'u' || n, jsonb_build_object('text', repeat('x', 500)) FROM generate_series(1, 150000) AS n"
    )
    await connection.close()
    program = (
        "import asyncio, re, sys\n"
        "from pathlib import Path\n"
        "from dotmac.platform.audit_trail import AuditAggregator\n"
        "async def main():\n"
        "    async with AuditAggregator(sys.argv[1], timeout=60) as audit:\n"
        "        made = await audit.export_events(sys.argv[2])\n"
        # Not ru_maxrss, which begins with what the process that started this one had.
        "    peak = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())\n"
        "    print(made.rows, int(peak[1]) // 1024)\n"
        "asyncio.run(main())\n"
    )
    for name in ("e.csv", "e.ndjson.zst", "e.json", "e.parquet"):
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", program, postgres_database, str(tmp_path / name)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        rows, peak = map(int, done.stdout.split())
        assert rows == 150_000
        assert peak < 200, name
