"""Several real servers that belong together, for tests: a primary with replicas and sentinels, a cluster.

Each starts within seconds, listens on free ports of 127.0.0.1, and stops with its context. A test that breaks
one needs one of its own.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from dotmac.platform.connection.servers import EmbeddedValkey
from dotmac.platform.errors import ServerUnavailable

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

__all__ = ["SLOTS", "EmbeddedCluster", "EmbeddedSentinels"]

SLOTS = 16_384

_LIMIT = 60.0
_FAILOVER_ENDS = 5.5
_SLOTS_FROM = 8  # in a line of CLUSTER NODES
# A server that is away is to be noticed, not waited for.
_ONCE = Retry(NoBackoff(), 0)
_QUICK = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")


class _Together:
    """Servers that start and stop together, in one temporary directory."""

    def __init__(self, program: str | os.PathLike[str] | None, args: Sequence[str]) -> None:
        self.program = program
        self._args = tuple(args)
        self._stack = ExitStack()
        self._clients: dict[int, redis.Redis] = {}
        self.directory = Path()

    def _start(self) -> None:
        raise NotImplementedError

    def client(self, server: EmbeddedValkey) -> redis.Redis:
        """A client of one of the servers, kept open until the end."""
        if server.port not in self._clients:
            self._clients[server.port] = redis.Redis(port=server.port, decode_responses=True, retry=_ONCE)
        return self._clients[server.port]

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="dotmac-"))
        self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self._stack.callback(self._close_clients)
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _run(self, server: EmbeddedValkey) -> EmbeddedValkey:
        # Not a temporary directory of its own: a server that is stopped for a while keeps what it needs.
        return self._stack.enter_context(server)

    def _close_clients(self) -> None:
        for client in self._clients.values():
            client.close()

    def _tell(self, server: EmbeddedValkey, *command: str | int) -> Any:
        client: Any = self.client(server)
        return client.execute_command(*command)

    def _ask(self, server: EmbeddedValkey, *command: str | int) -> Any:
        """The server's answer; None while it doesn't give one."""
        with suppress(redis.RedisError):
            return self._tell(server, *command)
        return None


class EmbeddedSentinels(_Together):
    """A primary, its replicas, and sentinels that watch over them and fail over within a second or two.

    Args:
        replicas: how many.
        sentinels: how many; most of them have to agree on a failover.
        service: what the sentinels call the primary.
        down_after: seconds of silence after which a sentinel takes a server for dead.
        program: the server to run; None for the wheel's Valkey.
        args: further arguments of the primary and its replicas.
        sentinel_config: further lines of the sentinels' configuration.
    """

    def __init__(
        self,
        *,
        replicas: int = 1,
        sentinels: int = 3,
        service: str = "mymaster",
        down_after: float = 1.0,
        program: str | os.PathLike[str] | None = None,
        args: Sequence[str] = (),
        sentinel_config: Sequence[str] = (),
    ) -> None:
        super().__init__(program, (*_QUICK, *args))
        self.service = service
        self._counts = (replicas, sentinels)
        self._down_after, self._config = down_after, tuple(sentinel_config)
        self.servers: list[EmbeddedValkey] = []
        self.sentinels: list[EmbeddedValkey] = []

    @property
    def url(self) -> str:
        """`redis+sentinel://127.0.0.1:port,…/service/0`."""
        places = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{places}/{quote(self.service, safe='')}/0"

    def primary(self) -> EmbeddedValkey:
        """The server that the sentinels agree on and that says itself that it is the primary.

        Raises: ServerUnavailable: there is none within a minute.
        """
        found: list[EmbeddedValkey] = []

        def agreed() -> bool:
            found[:] = self._named()
            return bool(found) and self._role(found[0]) == "master"

        _wait(agreed, "the sentinels don't agree on a primary")
        return found[0]

    def replicas(self) -> list[EmbeddedValkey]:
        """The other servers."""
        primary = self.primary()
        return [server for server in self.servers if server is not primary]

    def failover(self) -> EmbeddedValkey:
        """Have the sentinels promote a replica; returns the new primary, once all of them name it."""
        before = self.primary()
        self.await_replicas()

        asked = -math.inf

        def switched() -> bool:
            nonlocal asked
            if before not in (self._named() or [before]):
                return True
            # Refused while the last one isn't over, given up where no replica is fit for it at the moment.
            if time.monotonic() - asked > _FAILOVER_ENDS and any(
                self._ask(one, "SENTINEL", "FAILOVER", self.service) for one in self.sentinels
            ):
                asked = time.monotonic()
            return False

        _wait(switched, "the sentinels don't fail over")
        return self.primary()

    def await_switch(self, before: EmbeddedValkey) -> EmbeddedValkey:
        """Wait until another server is the primary, and return it."""
        _wait(lambda: before not in (self._named() or [before]), "the sentinels don't promote a replica")
        return self.primary()

    def await_replicas(self) -> None:
        """Wait until every running replica has what the primary has now."""
        primary = self.primary()
        written = self.client(primary).info("replication")["master_repl_offset"]

        def level() -> bool:
            info = self.client(primary).info("replication")
            there = [info[f"slave{number}"] for number in range(info["connected_slaves"])]
            running = [server for server in self.servers if server is not primary and server.running()]
            return len(there) >= len(running) and all(one["offset"] >= written for one in there)

        _wait(level, "the replicas don't follow the primary")

    def _start(self) -> None:
        replicas, sentinels = self._counts
        first = EmbeddedValkey(self.directory / "0", args=self._args, program=self.program)
        self.servers.append(self._run(first))
        for number in range(1, replicas + 1):
            args = (*self._args, "--replicaof", f"127.0.0.1 {first.port}")
            server = EmbeddedValkey(self.directory / str(number), args=args, program=self.program)
            self.servers.append(self._run(server))
        # A sentinel asks for the replicas at once, and then only every ten seconds.
        _wait(
            lambda: self.client(first).info("replication")["connected_slaves"] == replicas,
            "the replicas don't connect",
        )
        config = (
            f"sentinel monitor {self.service} 127.0.0.1 {first.port} {sentinels // 2 + 1}",
            f"sentinel down-after-milliseconds {self.service} {int(self._down_after * 1000)}",
            f"sentinel failover-timeout {self.service} 3000",
            f"sentinel parallel-syncs {self.service} {max(replicas, 1)}",
            *self._config,
        )
        for number in range(sentinels):
            server = _Sentinel(self.directory / f"s{number}", config=config, program=self.program)
            self.sentinels.append(self._run(server))
        _wait(self._acquainted, "the sentinels don't find each other")

    def _acquainted(self) -> bool:
        for sentinel in self.sentinels:
            # They get acquainted by messages that go out every two seconds, else; forgotten at a restart.
            self._ask(sentinel, "SENTINEL", "DEBUG", "publish-period", 200, "info-period", 500)
            state = self._ask(sentinel, "SENTINEL", "MASTER", self.service)
            if state is None or (int(state["num-slaves"]), int(state["num-other-sentinels"])) != (
                self._counts[0],
                len(self.sentinels) - 1,
            ):
                return False
        return True

    def _named(self) -> list[EmbeddedValkey]:
        """The one server that all running sentinels name, or nothing."""
        named = {
            int(place[1])
            for sentinel in self.sentinels
            if (place := self._ask(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service))
        }
        return [server for server in self.servers if named == {server.port}]

    def _role(self, server: EmbeddedValkey) -> str:
        role = self._ask(server, "ROLE")
        return str(role[0]) if role else ""


class _Sentinel(EmbeddedValkey):
    """A sentinel; what it learns stands in its configuration file."""

    def __init__(
        self, directory: Path, *, config: Sequence[str], program: str | os.PathLike[str] | None
    ) -> None:
        super().__init__(directory, program=program)
        self._file = directory / "sentinel.conf"
        self._first = (str(self._file), "--sentinel")
        self._config = config

    def _launch(self) -> None:
        if not self._file.exists():
            self._file.write_text("".join(f"{line}\n" for line in self._config))
        super()._launch()


class EmbeddedCluster(_Together):
    """A cluster whose primaries share the slots evenly.

    Args:
        primaries: how many.
        replicas: how many for each primary.
        node_timeout: seconds of silence after which a node counts as failing.
        program: the server to run; None for the wheel's Valkey.
        args: further arguments of every node.
    """

    def __init__(
        self,
        *,
        primaries: int = 3,
        replicas: int = 0,
        node_timeout: float = 1.0,
        program: str | os.PathLike[str] | None = None,
        args: Sequence[str] = (),
    ) -> None:
        super().__init__(program, (*_QUICK, *args))
        self._counts, self._node_timeout = (primaries, replicas), node_timeout
        self.nodes: list[EmbeddedValkey] = []
        self._ids: dict[int, str] = {}

    @property
    def url(self) -> str:
        """`redis+cluster://127.0.0.1:port,…`."""
        return f"redis+cluster://{','.join(f'127.0.0.1:{node.port}' for node in self.nodes)}"

    def node_of(self, slot: int) -> EmbeddedValkey:
        """The primary that serves a slot, as the running nodes agree on it."""
        found: list[EmbeddedValkey] = []

        def agreed() -> bool:
            owners = {self._owner(node, slot) for node in self.nodes if node.running()}
            found[:] = [node for node in self.nodes if owners == {self.id_of(node)}]
            return bool(found)

        _wait(agreed, f"the nodes don't agree on slot {slot}")
        return found[0]

    def id_of(self, node: EmbeddedValkey) -> str:
        """The name that the cluster knows a node by."""
        return self._ids[node.port]

    def replicas_of(self, node: EmbeddedValkey) -> list[EmbeddedValkey]:
        """The nodes that copy a primary, as the nodes see it."""
        lines = self._lines(next(one for one in self.nodes if one.running()))
        ids = [line[0] for line in lines if line[3] == self.id_of(node)]
        return [one for one in self.nodes if self.id_of(one) in ids]

    def migrate_slot(self, slot: int, to: EmbeddedValkey) -> None:
        """Move a slot with its keys, key by key, as resharding does; clients are redirected meanwhile."""
        self.begin_migration(slot, to)
        self.finish_migration(slot, to)

    def begin_migration(self, slot: int, to: EmbeddedValkey) -> None:
        """The first half: from here on, keys that the old node lacks are asked of the new one."""
        source = self.node_of(slot)
        self._tell(to, "CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        self._tell(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(to))

    def finish_migration(self, slot: int, to: EmbeddedValkey) -> None:
        """The second half: the keys move, then the slot."""
        source = self.node_of(slot)
        while keys := self._tell(source, "CLUSTER", "GETKEYSINSLOT", slot, 100):
            self._tell(source, "MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "REPLACE", "KEYS", *keys)
        # The new owner first: the other way round, the old one would send clients to a node that refuses.
        for node in (to, source, *self._primaries()):
            self._tell(node, "CLUSTER", "SETSLOT", slot, "NODE", self.id_of(to))
        _wait(lambda: self.node_of(slot) is to, f"slot {slot} does not move")

    def failover(self, primary: EmbeddedValkey) -> EmbeddedValkey:
        """Have a replica of this primary take over, in agreement with it; returns the replica."""
        _wait(lambda: any(map(self._copies, self.replicas_of(primary))), "no replica follows the primary")
        replica = next(filter(self._copies, self.replicas_of(primary)))
        own = next(line for line in self._lines(primary) if line[0] == self.id_of(primary))
        slot = int(own[_SLOTS_FROM].partition("-")[0])
        asked = -math.inf

        def taken_over() -> bool:
            nonlocal asked
            if self.node_of(slot) is replica:
                return True
            # Given up after 5 s where the others refuse their votes, as they do soon after the last failover.
            if time.monotonic() - asked > _FAILOVER_ENDS:
                asked = time.monotonic()
                self._ask(replica, "CLUSTER", "FAILOVER")
            return False

        _wait(taken_over, "the replica does not take over")
        return replica

    def await_takeover(self, primary: EmbeddedValkey, slot: int) -> EmbeddedValkey:
        """Wait until another node than this one, which has died, serves a slot, and return it."""
        _wait(lambda: self.node_of(slot) is not primary, f"nobody takes slot {slot} over")
        return self.node_of(slot)

    def _start(self) -> None:
        primaries, replicas = self._counts
        count = primaries * (1 + replicas)
        for number in range(count):
            args = (
                *("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"),
                *("--cluster-node-timeout", str(int(self._node_timeout * 1000))),
                *("--cluster-replica-validity-factor", "0", "--cluster-port", str(_free_port())),
                *self._args,
            )
            node = EmbeddedValkey(self.directory / str(number), args=args, program=self.program)
            self.nodes.append(self._run(node))
            self._ids[node.port] = str(self._tell(node, "CLUSTER", "MYID"))
        for number, node in enumerate(self.nodes):
            self._tell(node, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < primaries:
                first, end = (SLOTS * bound // primaries for bound in (number, number + 1))
                self._tell(node, "CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            bus = str(self.client(node).config_get("cluster-port")["cluster-port"])
            self._tell(self.nodes[0], "CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        _wait(lambda: all(len(self._lines(node)) == count for node in self.nodes), "the nodes don't meet")
        for number, node in enumerate(self.nodes[primaries:]):
            self._replicate(node, self.nodes[number % primaries])
        _wait(self._settled, "the cluster does not come up")

    def _replicate(self, node: EmbeddedValkey, primary: EmbeddedValkey) -> None:
        _wait(
            lambda: self._ask(node, "CLUSTER", "REPLICATE", self.id_of(primary)),
            "a node does not become a replica",
        )

    def _settled(self) -> bool:
        replicas = self._counts[0] * self._counts[1]
        for node in self.nodes:
            if "cluster_state:ok" not in str(self._ask(node, "CLUSTER", "INFO")):
                return False
            flags = [line[2] for line in self._lines(node)]
            if sum("slave" in one for one in flags) != replicas or any("handshake" in one for one in flags):
                return False
        return sum(map(self._copies, self.nodes)) == replicas

    def _copies(self, node: EmbeddedValkey) -> bool:
        """Is it a replica that has caught up with its primary?"""
        return bool(self.client(node).info("replication").get("master_link_status") == "up")

    def _primaries(self) -> Iterator[EmbeddedValkey]:
        for node in self.nodes:
            role = self._ask(node, "ROLE")
            if role and role[0] == "master":
                yield node

    def _lines(self, node: EmbeddedValkey) -> list[list[str]]:
        """What a node says of each: id, address, flags, primary, …, then the slots."""
        client: Any
        with redis.Redis(port=node.port, retry=_ONCE) as client:
            # As it is: redis-py turns the answer into a dictionary by address otherwise.
            client.response_callbacks.pop("CLUSTER NODES", None)
            said = client.execute_command("CLUSTER NODES")
        return [line.split(" ") for line in said.decode().splitlines()]

    def _owner(self, node: EmbeddedValkey, slot: int) -> str | None:
        for line in self._lines(node):
            for part in line[_SLOTS_FROM:]:
                first, _, last = part.partition("-")
                if not part.startswith("[") and int(first) <= slot <= int(last or first):
                    return line[0]
        return None


def _free_port() -> int:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(condition: Callable[[], object], complaint: str) -> None:
    deadline = time.monotonic() + _LIMIT
    while not condition():
        if time.monotonic() > deadline:
            raise ServerUnavailable(f"{complaint} within {_LIMIT:g} s")
        time.sleep(0.02)
