"""Forwarding of events from a real database to servers that fail.

Promises:
- every stored event is delivered at least once, in the order of storing, whatever happens: servers that
  answer 500, hang, cut the connection before or after they took a batch, or restart; the forwarder cancelled
  and started again;
- to webhooks a batch whose answer was lost comes again as it was, under the same key, so that a receiver
  that keeps keys takes each event exactly once; what is posted is signed, and the check refuses what is
  altered or old;
- a server that takes connections and closes them is tried with pauses, a bounded number of times;
- what a destination refuses is found within its batch and put aside, with an event that tells; so is what
  failed too often; `retry_dead_letters` delivers it later;
- messages are RFC 5424's, framed as RFC 6587 says, over UDP, TCP and TLS; a server of another authority is
  refused;
- of several forwarders of one name one delivers, and another takes over when it dies;
- a position of a cluster that had counted further is refused, and stays;
- filters hold, positions stay, `once` ends.
"""

from __future__ import annotations

# ruff: noqa: B023 (what is waited for is of the loop's own round)
import asyncio
import json
import re
import ssl

import asyncpg
import pytest

from dotmac.platform.audit_trail import AuditAggregator, SyslogDestination, WebhookDestination, verify_webhook
from dotmac.platform.audit_trail.forward import run as forward_run
from dotmac.platform.audit_trail.forward.destination import Refused
from dotmac.platform.errors import DeliveryFailed, InvalidArgument, TransactionsRewound
from support.receivers import SyslogServer, WebhookServer

SECRET = "a secret of more than sixteen letters"
RFC5424 = re.compile(
    rb"<(\d{1,3})>1 (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z) (\S{1,255}) (\S{1,48}) - (\S{1,32}) "
    rb'(\[audit@32473(?: [A-Za-z]+="(?:[^"\\\]]|\\["\\\]])*")*\]) \xef\xbb\xbf(\{.*\})',
    re.DOTALL,
)


@pytest.fixture
async def audit(migrated_url):
    async with AuditAggregator(migrated_url, timeout=20) as aggregator:
        yield aggregator


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(forward_run, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(forward_run, "_LONGEST_PAUSE", 0.1)


async def log(audit, tenant, count, **more):
    return [
        str(await audit.log_event("BUSINESS", f"order.placed{number}", tenant_id=tenant, **more))
        for number in range(count)
    ]


def webhook(server, **more):
    return WebhookDestination(server.url, **({"secret": SECRET, "timeout": 1.0} | more))


async def forward(audit, destination, unique, **more):
    given = {"name": unique, "start": "beginning", "tenant_id": unique, "poll": 0.02, "once": True} | more
    try:
        return await audit.forward_events(destination, **given)
    finally:
        await destination.aclose()


async def until(condition, seconds=30):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def in_order(found, wanted):
    """Each at least once, and the first time of each in the order of storing."""
    return list(dict.fromkeys(found)) == wanted


def syslog_ids(server):
    return [json.loads(RFC5424.fullmatch(message)[7])["id"] for message in server.messages]


# --- webhooks


async def test_events_arrive_signed_and_in_order(audit, unique):
    ids = await log(audit, unique, 25, user_id="ada", metadata={"n": 1})
    await log(audit, unique + "other", 2)
    async with WebhookServer() as server:
        told = []
        made = await forward(
            audit, webhook(server), unique, batch_size=10, progress=lambda one: told.append(one.delivered)
        )
        assert (made.delivered, made.dead_letters, made.failures) == (25, 0, 0)
        assert told[-1] == 25
        assert server.ids == ids
        assert [len(json.loads(body)["events"]) for _, body in server.taken] == [10, 10, 5]
        keys = {verify_webhook(headers, body, SECRET) for headers, body in server.taken}
        assert len(keys) == 3
        assert json.loads(server.taken[0][1])["events"][0]["user_id"] == "ada"
        assert (await forward(audit, webhook(server), unique)).delivered == 0
        more = await log(audit, unique, 3)
        assert (await forward(audit, webhook(server, payload="ocsf"), unique)).delivered == 3
        events = json.loads(server.taken[-1][1])["events"]
        assert [event["metadata"]["uid"] for event in events] == more


async def test_failing_answers_are_tried_again(audit, unique):
    ids = await log(audit, unique, 12)
    async with WebhookServer() as server:
        server.answers = [500, "hang", "cut", (503, {"retry-after": "0"}), 429, 401, 302]
        task = asyncio.ensure_future(
            forward(audit, webhook(server, timeout=0.3), unique, batch_size=5, once=False)
        )
        await until(lambda: server.ids == ids)
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.wait({task})
        assert server.ids == ids
        assert len({headers["webhook-id"] for headers, _ in server.tried[:8]}) == 1


async def test_a_batch_whose_answer_was_lost_comes_again_under_its_key(audit, unique):
    ids = await log(audit, unique, 30)
    async with WebhookServer() as server:
        server.answers = [200, "lost", "lost", 200, "lost"]
        await forward(audit, webhook(server), unique, batch_size=7)
        once = {headers["webhook-id"]: body for headers, body in server.taken}
        assert [event["id"] for body in once.values() for event in json.loads(body)["events"]] == ids
        assert len(server.ids) == 30 + 3 * 7


async def test_what_is_rare_is_not_looked_for_again_after_a_failure(audit, unique, migrated_url):
    """Behind many transactions of others, the place that was reached is kept while the destination fails."""
    connection = await asyncpg.connect(migrated_url)
    try:
        for _ in range(60):
            await connection.execute("SELECT pg_current_xact_id()")
        ids = await log(audit, unique, 3)
        async with WebhookServer() as server:
            server.answers = [500] * 5
            with pytest.raises(DeliveryFailed):
                await forward(audit, webhook(server), unique)
            place = "SELECT line, pending_tx FROM audit_forward_positions WHERE destination = $1"
            row = await connection.fetchrow(place, unique)
            first = "SELECT min(recorded_tx) FROM audit_events WHERE tenant_id = $1"
            begin = await connection.fetchval(first, unique)
            assert row["line"] > 0
            assert row["line"] <= begin <= row["pending_tx"]
            await forward(audit, webhook(server), unique)
            assert server.ids == ids
    finally:
        await connection.close()


async def test_stopped_and_started_again_and_again(audit, unique):
    ids = await log(audit, unique, 60)
    async with WebhookServer() as server:
        for stop in range(8):
            server.answers = [200] * (stop % 3) + ["lost"]
            before = len(server.tried)
            task = asyncio.ensure_future(
                forward(audit, webhook(server), unique, batch_size=4 + stop, once=False)
            )
            await until(
                lambda before=before, stop=stop: (
                    len(server.tried) > before + stop % 3 or len(set(server.ids)) == 60
                )
            )
            task.cancel()
            await asyncio.wait({task})
        await forward(audit, webhook(server), unique, batch_size=3)
        once = {headers["webhook-id"]: body for headers, body in server.taken}
        assert [event["id"] for body in once.values() for event in json.loads(body)["events"]] == ids


async def test_a_server_that_restarts(audit, unique):
    ids = []
    async with WebhookServer() as server:
        task = asyncio.ensure_future(forward(audit, webhook(server), unique, batch_size=3, once=False))
        for _ in range(3):
            ids += await log(audit, unique, 10)
            await until(lambda: server.ids and server.ids[-1] == ids[-1])
            await server.stop()
            ids += await log(audit, unique, 5)
            await asyncio.sleep(0.1)
            await server.start()
        await until(lambda: in_order(server.ids, ids))
        task.cancel()
        await asyncio.wait({task})


async def test_what_is_refused_is_found_and_put_aside(audit, unique):
    ids = await log(audit, unique, 20)
    bad = {ids[3], ids[4], ids[17]}
    async with WebhookServer() as server:
        server.choose = lambda events: 422 if bad & {event["id"] for event in events} else None
        made = await forward(audit, webhook(server), unique, batch_size=8)
        assert (made.delivered, made.dead_letters) == (17, 3)
        assert server.ids == [one for one in ids if one not in bad]
        letters = await audit.dead_letters(unique)
        assert {str(event.id) for event, _ in letters} == bad
        assert "HTTP 422" in letters[0][1]
        told = await audit.query_events(actions="audit.forward.dead_letters", limit=10)
        about = [one for one in told if one.metadata["destination"] == unique]
        assert sum(one.metadata["events"] for one in about) == 3
        assert all(one.level == "error" and "HTTP 422" in one.metadata["reason"] for one in about)
        server.choose = lambda events: 422 if ids[4] in {event["id"] for event in events} else None
        destination = webhook(server)
        with pytest.raises(DeliveryFailed, match="422"):
            await audit.retry_dead_letters(destination, name=unique)
        assert server.ids[-1] == ids[3]
        server.choose = None
        assert await audit.retry_dead_letters(destination, name=unique) == 2
        await destination.aclose()
        assert set(server.ids) == set(ids)
        assert await audit.dead_letters(unique) == []


async def test_half_a_refused_batch_comes_again_under_its_key(audit, unique):
    ids = await log(audit, unique, 8)
    async with WebhookServer() as server:

        def stop_after_the_first_half(events):
            if len(events) == 8:
                return 422
            task.cancel()
            return None

        server.choose = stop_after_the_first_half
        task = asyncio.ensure_future(forward(audit, webhook(server), unique, batch_size=8))
        await asyncio.wait({task})
        await until(lambda: server.ids == ids[:4])
        server.choose = None
        await forward(audit, webhook(server), unique, batch_size=8)
        once = {headers["webhook-id"]: body for headers, body in server.taken}
        assert [event["id"] for body in once.values() for event in json.loads(body)["events"]] == ids


async def test_a_refusal_does_not_confirm_what_was_sent_before_it(audit, unique):
    ids = await log(audit, unique, 6)

    class Breaking:
        """Refuses one event, and loses what it had not confirmed by then."""

        label, settle = "breaking", 0.1

        def __init__(self):
            self.buffer, self.kept, self.state = [], [], "whole"

        async def send(self, events, key):
            if ids[3] in {str(event.id) for event in events}:
                if self.state == "whole":
                    self.buffer, self.state = [], "breaking"
                raise Refused("no")
            self.buffer += [str(event.id) for event in events]

        def settled(self):
            if self.state == "breaking":
                self.buffer, self.state = [], "broke"
                raise DeliveryFailed("gone")
            if self.state == "broke":
                self.kept, self.buffer = self.kept + self.buffer, []
            return self.state == "broke"

        async def aclose(self):
            pass

    destination = Breaking()
    made = await forward(audit, destination, unique, batch_size=2)
    assert (made.delivered, made.dead_letters) == (5, 1)
    assert list(dict.fromkeys(destination.kept)) == [one for one in ids if one != ids[3]]


async def test_dead_letters_stay_until_they_are_confirmed(audit, unique):
    ids = await log(audit, unique, 3)
    async with SyslogServer() as server:
        server.cut_after = 0
        destination = SyslogDestination(server.url, settle=0.2)
        task = asyncio.ensure_future(forward(audit, destination, unique, once=False, max_attempts=1))
        await until_put_aside(audit, unique, 3)
        task.cancel()
        await asyncio.wait({task})
        with pytest.raises(DeliveryFailed):
            await audit.retry_dead_letters(destination, name=unique)
        assert len(await audit.dead_letters(unique)) == 3
        server.cut_after = None
        assert await audit.retry_dead_letters(destination, name=unique) == 3
        assert in_order(syslog_ids(server), ids)
        assert await audit.dead_letters(unique) == []
        await destination.aclose()


async def test_what_fails_too_often_is_put_aside(audit, unique):
    ids = await log(audit, unique, 6)
    async with WebhookServer() as server:
        server.choose = lambda events: 500 if events[0]["id"] == ids[0] else None
        task = asyncio.ensure_future(
            forward(audit, webhook(server), unique, batch_size=2, max_attempts=4, once=False)
        )
        await until(lambda: server.ids == ids[2:])
        task.cancel()
        await asyncio.wait({task})
        assert len(server.tried) == 4 + 2
        letters = await audit.dead_letters(unique)
        assert [str(event.id) for event, _ in letters] == ids[:2]


async def test_once_gives_up_with_an_error(audit, unique, unused_tcp_port):
    await log(audit, unique, 2)
    destination = WebhookDestination(f"http://127.0.0.1:{unused_tcp_port}/x", secret=SECRET, timeout=1)
    with pytest.raises(DeliveryFailed, match=str(unused_tcp_port)):
        await forward(audit, destination, unique)
    assert await audit.dead_letters(unique) == []


async def test_one_delivers_and_another_takes_over(audit, unique, migrated_url):
    async with WebhookServer() as server, AuditAggregator(migrated_url, timeout=20) as other:
        pace = {"once": False, "batch_size": 5}
        first = asyncio.ensure_future(forward(audit, webhook(server), unique, **pace))
        ids = await log(audit, unique, 7)
        await until(lambda: server.ids == ids)
        assert (await forward(other, webhook(server), unique)).elsewhere
        second = asyncio.ensure_future(forward(other, webhook(server), unique, **pace))
        ids += await log(audit, unique, 7)
        await until(lambda: server.ids == ids)
        # The first one's lock goes with its connection, as when its process dies.
        killer = await asyncpg.connect(migrated_url)
        await killer.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted "
            "AND ((classid::bigint << 32) | objid::bigint) "
            "= hashtextextended('dotmac audit forward ' || $1, 0)",
            unique,
        )
        await killer.close()
        ids += await log(audit, unique, 7)
        await until(lambda: in_order(server.ids, ids))
        first.cancel()
        await asyncio.wait({first})
        ids += await log(audit, unique, 7)
        await until(lambda: in_order(server.ids, ids))
        second.cancel()
        await asyncio.wait({second})


async def test_events_of_transactions_that_end_late_are_not_missed(audit, unique, migrated_url):
    late = await asyncpg.connect(migrated_url)
    await late.execute("BEGIN")
    wanted = await late.fetchval(
        "INSERT INTO audit_events (occurred_at, id, category, action, level, outcome, tenant_id) "
        "VALUES (now(), gen_random_uuid(), 'system', 'late', 'info', 'success', $1) RETURNING id",
        unique,
    )
    async with WebhookServer() as server:
        task = asyncio.ensure_future(forward(audit, webhook(server), unique, once=False))
        ids = await log(audit, unique, 3)
        await asyncio.sleep(0.3)
        await late.execute("COMMIT")
        await late.close()
        await until(lambda: len(server.ids) == 4)
        assert server.ids == [str(wanted), *ids]
        task.cancel()
        await asyncio.wait({task})


async def test_a_cluster_that_counts_from_less_is_told(audit, unique, migrated_url):
    """As a dump brings it: the position is of the old cluster, and the new one has not come to it."""
    await log(audit, unique, 2)
    async with WebhookServer() as server:
        await forward(audit, webhook(server), unique)
        owner = await asyncpg.connect(migrated_url)
        try:
            move = "UPDATE audit_forward_positions SET line = $2 WHERE destination = $1"
            await owner.execute(move, unique, (7 << 32) + 5)
            await log(audit, unique, 1)
            for once in (True, False):
                with pytest.raises(TransactionsRewound, match="pg_resetwal --epoch=8"):
                    await forward(audit, webhook(server), unique, once=once)
            line = "SELECT line FROM audit_forward_positions WHERE destination = $1"
            assert await owner.fetchval(line, unique) == (7 << 32) + 5
        finally:
            await owner.close()
        assert len(server.ids) == 2


async def test_by_default_a_name_begins_with_the_present(audit, unique):
    await log(audit, unique, 3)
    async with WebhookServer() as server:
        assert (await forward(audit, webhook(server), unique, start="now")).delivered == 0
        ids = await log(audit, unique, 2)
        await log(audit, unique, 1, level="DEBUG")
        await forward(audit, webhook(server), unique, levels=["INFO"], start="now")
        assert server.ids == ids


async def test_signatures_that_do_not_fit_are_refused(audit, unique):
    await log(audit, unique, 1)
    async with WebhookServer() as server:
        key = "whsec_" + "c2VjcmV0IHNlY3JldCBzZWNyZXQ="
        await forward(audit, webhook(server, secret=[key, SECRET]), unique)
        headers, body = server.taken[0]
    assert verify_webhook(headers, body, SECRET) == verify_webhook(headers, body, key)
    assert headers["idempotency-key"] == headers["webhook-id"]
    for spoilt, match in (
        ((headers, body + b" ", SECRET), "webhook-signature"),
        ((headers, body, "another secret, long enough"), "webhook-signature"),
        ((headers | {"webhook-id": "msg_other"}, body, SECRET), "webhook-signature"),
        (({k: v for k, v in headers.items() if k != "webhook-signature"}, body, SECRET), "missing"),
        ((headers | {"webhook-timestamp": "1"}, body, SECRET), "within 300 s"),
    ):
        with pytest.raises(InvalidArgument, match=match):
            verify_webhook(*spoilt)


def test_the_vector_of_standard_webhooks():
    """The example of https://github.com/standard-webhooks/standard-webhooks, spec: "Signature scheme"."""
    headers = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    body, secret = b'{"test": 2432232314}', "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    assert verify_webhook(headers, body, secret, now=1614265330.0) == headers["webhook-id"]


# --- syslog


@pytest.fixture
def tls(certificates):
    """Contexts of a server, of a client that knows its authority, and of one that does not."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    return (
        server,
        ssl.create_default_context(cafile=certificates / "ca.pem"),
        ssl.create_default_context(cafile=certificates / "other.pem"),
    )


@pytest.mark.parametrize("kind", ["udp", "tcp", "tls"])
async def test_syslog_messages_arrive_in_order(audit, unique, kind, tls):
    ids = await log(audit, unique, 40, user_id='a"]\\x', metadata={"text": "☃\n"})
    async with SyslogServer(kind, tls[0] if kind == "tls" else None) as server:
        destination = SyslogDestination(server.url, settle=0.1, ssl_context=tls[1] if kind == "tls" else None)
        made = await forward(audit, destination, unique, batch_size=15)
        assert made.delivered == 40
        assert syslog_ids(server) == ids
        found = RFC5424.fullmatch(server.messages[0])
        assert found[1] == b"110"  # facility 13, severity 6
        assert found[4] == b"dotmac-audit"
        assert found[5] == b"order.placed0"
        assert b' user="a\\"\\]\\\\x"' in found[6]
        assert json.loads(found[7])["metadata"] == {"text": "☃\n"}


async def test_a_syslog_server_that_cuts_connections(audit, unique):
    ids = await log(audit, unique, 60)
    async with SyslogServer() as server:
        server.cut_after = 13
        destination = SyslogDestination(server.url, settle=0.2)
        task = asyncio.ensure_future(forward(audit, destination, unique, batch_size=5, once=False))
        await until(lambda: server.cuts >= 3)
        server.cut_after = None
        await until(lambda: in_order(syslog_ids(server), ids))
        task.cancel()
        await asyncio.wait({task})


@pytest.mark.parametrize("kind", ["tcp", "tls"])
async def test_a_syslog_server_that_closes_at_once(audit, unique, kind, tls):
    await log(audit, unique, 3)
    server_context, client_context, _ = tls
    accepted = []

    async def closing(reader, writer):
        accepted.append(asyncio.get_running_loop().time())
        writer.close()

    async with await asyncio.start_server(
        closing, "127.0.0.1", 0, ssl=server_context if kind == "tls" else None
    ) as server:
        host = "localhost" if kind == "tls" else "127.0.0.1"
        url = f"syslog+{kind}://{host}:{server.sockets[0].getsockname()[1]}"
        more = {"ssl_context": client_context} if kind == "tls" else {}

        def destination():
            return SyslogDestination(url, settle=0.05, **more)

        async with asyncio.timeout(20):
            with pytest.raises(DeliveryFailed):
                await forward(audit, destination(), unique, batch_size=1)
        assert len(accepted) <= 2 * 5  # five tries, and in each maybe a second connection
        accepted.clear()
        task = asyncio.ensure_future(
            forward(audit, destination(), unique, batch_size=2, once=False, max_attempts=3)
        )
        await until_put_aside(audit, unique, 3)
        task.cancel()
        await asyncio.wait({task})
        assert len(accepted) <= 2 * (6 + 3)
        assert min(later - one for one, later in zip(accepted, accepted[2:], strict=False)) > 0.004


async def until_put_aside(audit, name, count):
    async with asyncio.timeout(20):
        while len(await audit.dead_letters(name)) < count:
            await asyncio.sleep(0.02)


async def test_a_syslog_server_that_restarts_and_a_forwarder_that_does(audit, unique):
    ids = await log(audit, unique, 20)
    async with SyslogServer() as server:
        for _ in range(3):
            destination = SyslogDestination(server.url, settle=0.1)
            task = asyncio.ensure_future(forward(audit, destination, unique, batch_size=5, once=False))
            await until(lambda: in_order(syslog_ids(server), ids))
            await server.stop()
            ids += await log(audit, unique, 10)
            await asyncio.sleep(0.2)
            task.cancel()
            await asyncio.wait({task})
            await server.start()
        await forward(audit, SyslogDestination(server.url, settle=0.1), unique)
        assert in_order(syslog_ids(server), ids)


async def test_a_server_of_another_authority_is_refused(audit, unique, tls):
    await log(audit, unique, 1)
    async with SyslogServer("tls", tls[0]) as server:
        destination = SyslogDestination(server.url, ssl_context=tls[2])
        with pytest.raises(DeliveryFailed, match=r"(?i)certificate"):
            await forward(audit, destination, unique)
        assert server.messages == []


async def test_long_messages_are_shortened(audit, unique):
    ids = await log(audit, unique, 2, metadata={"text": "x" * 100_000})
    async with SyslogServer("udp") as server:
        await forward(audit, SyslogDestination(server.url, settle=0.1), unique)
        assert syslog_ids(server) == ids
        said = json.loads(RFC5424.fullmatch(server.messages[0])[7])
        assert said["shortened"] is True
        assert said["action"] == "order.placed0"
        assert "metadata" not in said


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SyslogDestination("syslog://host"), "url"),
        (lambda: SyslogDestination("syslog+tcp://"), "url"),
        (lambda: SyslogDestination("syslog+tcp://host:99999"), "url"),
        (lambda: SyslogDestination("syslog+tcp://host", facility=24), "facility"),
        (lambda: SyslogDestination("syslog+tcp://host", sd_id="a b"), "sd_id"),
        (lambda: SyslogDestination("syslog+tcp://host", payload="xml"), "payload"),
        (lambda: SyslogDestination("syslog+tcp://host", timeout=0), "timeout"),
        (lambda: WebhookDestination("ftp://host", secret=SECRET), "url"),
        (lambda: WebhookDestination("https://host", secret="short"), "secret"),
        (lambda: WebhookDestination("https://host", secret="whsec_!"), "secret"),
        (lambda: WebhookDestination("https://host", secret=[]), "secret"),
        (lambda: WebhookDestination("https://host", secret=SECRET, payload="xml"), "payload"),
    ],
)
def test_wrong_destinations_are_refused_by_name(make, match):
    with pytest.raises(InvalidArgument, match=match):
        make()


async def test_wrong_arguments_are_refused_by_name(audit):
    destination = WebhookDestination("https://host/path", secret=SECRET)
    for given, match in (
        ({"start": "yesterday"}, "start"), ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 20_000}, "batch_size"), ({"colour": 1}, "colour"),
        ({"poll": -1}, "poll"), ({"max_attempts": -1}, "max_attempts"), ({"name": ""}, "name"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=match):
            await audit.forward_events(destination, **given)
    one, other = (
        WebhookDestination(
            f"https://user:pass@hooks.example.com/services/{token}?t={token}", secret=SECRET
        ).label
        for token in ("T0ken", "An0ther")
    )
    assert re.fullmatch(r"https://hooks\.example\.com#[0-9a-f]{8}", one)
    assert one != other
    assert WebhookDestination("https://host:8443/", secret=SECRET).label == "https://host:8443"
