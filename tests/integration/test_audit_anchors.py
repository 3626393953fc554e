"""Where checkpoints are kept outside the database.

Promises: a file, an HTTP endpoint and an object store (fsspec's memory file system) give back what they took,
of the trail asked for alone; nothing is overwritten; a place that fails is told by its name without its
password, and gets the checkpoints at the next try; a line cut off by a crash spoils only itself.
"""

from __future__ import annotations

import asyncio
import json
from urllib.parse import parse_qs, urlsplit

import fsspec
import pytest

from dotmac.platform.audit_trail.integrity import Checkpoint, anchors
from dotmac.platform.audit_trail.integrity.anchors import anchor_at, anchors_at
from dotmac.platform.errors import AnchorUnavailable, InvalidArgument

TRAIL = "example.com/audit"
KEPT = [
    (Checkpoint(TRAIL, 1, b"1" * 32), "note 1\n"),
    (Checkpoint(f"{TRAIL}/ten%2Fant", 2, b"2" * 32), "note 2\n"),
    (Checkpoint(TRAIL, 2, b"3" * 32), "note 3 ü\n"),
]
OTHER = (Checkpoint("example.com/audit2", 9, b"9" * 32), "another trail's\n")


async def read(anchor, trail=TRAIL):
    return sorted([note async for note in anchor.notes(trail)])


async def keep_all(anchor):
    assert await read(anchor) == []
    for checkpoint, note in (*KEPT, OTHER):
        await anchor.put(checkpoint, note)
    assert await read(anchor) == ["note 1\n", "note 2\n", "note 3 ü\n"]
    assert await read(anchor, "example.com/audit2") == ["another trail's\n"]


async def test_a_file(tmp_path):
    anchor = anchor_at((tmp_path / "a b.jsonl").as_uri())
    await keep_all(anchor)
    # A process died in the middle of a line: it is told, and the next one begins anew.
    with (tmp_path / "a b.jsonl").open("a") as file:
        file.write('{"origin": "example.com/au')
    assert len(await read(anchor)) == 4
    await anchor.put(*KEPT[0])
    found = await read(anchor)
    assert found.count("note 1\n") == 2
    assert len(found) == 5
    many = [Checkpoint(TRAIL, size, b"4" * 32) for size in range(3, 60)]
    await asyncio.gather(*(anchor.put(one, f"size {one.size}\n") for one in many))
    assert len(await read(anchor)) == 5 + len(many)


async def test_a_file_that_can_not_be_written(tmp_path):
    anchor = anchor_at((tmp_path / "no" / "such").as_uri())
    with pytest.raises(AnchorUnavailable, match="No such file"):
        await anchor.put(*KEPT[0])
    (tmp_path / "folder").mkdir()
    with pytest.raises(AnchorUnavailable, match="directory"):
        await read(anchor_at((tmp_path / "folder").as_uri()))
    full = anchor_at("file:///dev/full")
    with pytest.raises(AnchorUnavailable, match="No space left"):
        await full.put(*KEPT[0])


async def test_an_object_store():
    store = fsspec.filesystem("memory")
    anchor = anchor_at("memory://audit/checkpoints")
    try:
        await keep_all(anchor)
        before = store.find("/audit/checkpoints")
        await anchor.put(KEPT[0][0], "somebody else's")
        assert "note 1\n" in await read(anchor)
        assert store.find("/audit/checkpoints") == before
        # Another history of the same size stands beside it.
        await anchor.put(Checkpoint(TRAIL, 1, b"x" * 32), "fork\n")
        assert len(await read(anchor)) == 4
    finally:
        store.rm("/audit", recursive=True)


class Endpoint:
    """What an HTTP anchor talks to."""

    def __init__(self):
        self.notes, self.status = [], 201

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()

    async def serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, target, _ = head.split(" ", 2)
        if method == "POST":
            length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
            note = (await reader.readexactly(length)).decode()
            status, body = self.status, b""
            if status < 300:
                self.notes.append(note)
        else:
            trail = parse_qs(urlsplit(target).query)["origin"][0]
            lines = [json.dumps({"origin": trail, "note": note}) + "\n" for note in self.notes]
            status, body = (200 if lines else 404), "".join(lines).encode()
        writer.write(
            f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
        )
        await writer.drain()
        writer.close()


async def test_an_endpoint():
    async with Endpoint() as endpoint:
        anchor = anchor_at(f"http://user:secret@127.0.0.1:{endpoint.port}/checkpoints")
        assert await read(anchor) == []
        for checkpoint, note in KEPT:
            await anchor.put(checkpoint, note)
        assert await read(anchor) == ["note 1\n", "note 2\n", "note 3 ü\n"]
        endpoint.status = 503
        with pytest.raises(AnchorUnavailable, match="503") as caught:
            await anchor.put(*KEPT[0])
        assert "secret" not in str(caught.value)
        assert "secret" not in anchor.place
    with pytest.raises(AnchorUnavailable, match="ConnectError"):
        await read(anchor)


async def test_a_place_that_gives_too_much_or_takes_too_long(tmp_path, monkeypatch):
    (tmp_path / "line").write_bytes(b"x" * (anchors._MOST_LINE + 1))
    with pytest.raises(AnchorUnavailable, match="a line of more than"):
        await read(anchor_at((tmp_path / "line").as_uri()))
    monkeypatch.setattr(anchors, "_MOST_BYTES", 1_000)
    (tmp_path / "long").write_bytes(b"{}\n" * 400)
    with pytest.raises(AnchorUnavailable, match="more than 1000 bytes"):
        await read(anchor_at((tmp_path / "long").as_uri()))

    class Slow:
        place = "slow"

        async def notes(self, trail):
            yield trail
            await asyncio.sleep(60)

    monkeypatch.setattr(anchors, "_READING_SECONDS", 0.05)
    with pytest.raises(AnchorUnavailable, match="slow: reading took"):
        async for note in anchors.bounded_notes(Slow(), TRAIL):
            assert note == TRAIL


@pytest.mark.parametrize(
    "address", ["", "checkpoints", "/var/checkpoints", "file://host/x", "http://", "file:"]
)
def test_addresses_that_are_none(address):
    with pytest.raises(InvalidArgument, match="anchors"):
        anchor_at(address)


def test_a_list_of_addresses():
    assert anchors_at(None) == anchors_at(" , ") == []
    assert [one.place for one in anchors_at("file:///a, https://example.com/b")] == [
        "file:///a",
        "https://example.com/b",
    ]
    with pytest.raises(InvalidArgument, match="fsspec can't open it"):
        anchor_at("nosuchscheme://x")
