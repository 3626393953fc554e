"""The servers of a run, by topology, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import redis

from chaos.faults import CLUSTER, SENTINEL, STANDALONE
from chaos.plans import groups_of, one_group
from dotmac.platform.errors import ServerUnavailable
from dotmac.platform.testing.topologies import EmbeddedCluster, EmbeddedSentinels
from support.clock import ClockedValkey
from support.cluster import slot_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from chaos.faults import Planned
    from chaos.plans import Group
    from dotmac.platform.connection.embedded import EmbeddedValkey

# Written before each answer, so that a killed server has lost nothing that it confirmed.
LASTING = ("--appendonly", "yes", "--appendfsync", "no")
AHEAD = 0.5  # seconds: shorter than what replicas are taken for dead after
LIMIT = 60.0  # seconds for servers to come together again
PATIENCE = 8.0


class Servers(ABC):
    """What a run uses.

    Args:
        namespace: of the locks.
        seed: decides which of several servers is hit.
    """

    topology: str
    proxied = False
    timeouts = (1.0, 2.0, 4.0, 8.0)

    def __init__(self, namespace: str, seed: int) -> None:
        self.namespace = namespace
        self._chance = random.Random(f"{seed}/servers")
        self._stack = ExitStack()
        self.unfinished: list[Callable[[], object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    @abstractmethod
    def url(self) -> str:
        """What workers connect to."""

    @abstractmethod
    def groups(self) -> list[Group]:
        """Names of locks; those of a group lie together."""

    @abstractmethod
    def primaries(self) -> Iterator[Any]:
        """A client for each server that has locks."""

    @abstractmethod
    async def do(self, fault: Planned) -> None:
        """Lets a fault happen; returns when it is over for those who use the servers."""

    async def finish(self) -> None:
        """Does what a fault has left to be done before the next, and what harms nobody."""
        while self.unfinished:
            await asyncio.to_thread(self.unfinished.pop(0))

    def clock(self, seconds: int) -> None:  # noqa: B027 - where there is no such clock
        """Steps the servers' wall clock."""

    def serving(self) -> object:
        """Which servers serve the locks now; None where that does not change or can't be told."""
        return None

    def grace(self) -> int:
        """For how long an emptied server grants nothing from its first session on, nanoseconds; -1 while it
        has none."""
        raise NotImplementedError


class Standalone(Servers):
    """A server whose data outlive it until they are thrown away."""

    topology = STANDALONE
    proxied = True
    timeouts = (0.5, 1.0, 2.0, 4.0)

    def __init__(self, namespace: str, seed: int, directory: Path) -> None:
        super().__init__(namespace, seed)
        self.server = ClockedValkey(directory / "server", args=LASTING)

    def __enter__(self) -> Self:
        self._stack.enter_context(self.server)
        self.admin = self._stack.enter_context(
            redis.Redis.from_url(self.server.unix_url, socket_timeout=10, decode_responses=True)
        )
        return self

    @property
    def url(self) -> str:
        return self.server.url

    def groups(self) -> list[Group]:
        return one_group()

    def primaries(self) -> Iterator[Any]:
        yield self.admin

    def clock(self, seconds: int) -> None:
        self.server.clock.step(seconds)

    def grace(self) -> int:
        begin, end = self.admin.hmget(f"{{{self.namespace}:0}}:m", "b", "z")
        if begin is None:
            return -1
        return (int(end) - int(begin)) * 1_000_000 if end else 0

    async def do(self, fault: Planned) -> None:
        match fault.kind:
            case "server stopped":
                await asyncio.to_thread(self.server.pause)
                await asyncio.sleep(fault.amount)
                self.server.resume()
            case "server restarted" | "server emptied":
                await asyncio.to_thread(self.server.kill)
                if fault.kind == "server emptied":
                    shutil.rmtree(self.server.directory / "appendonlydir", ignore_errors=True)
                await asyncio.sleep(fault.amount)
                await asyncio.to_thread(self.server.start)
            case "flushall":
                await asyncio.to_thread(self.admin.flushall)
            case "script flush":
                await asyncio.to_thread(self.admin.script_flush)
            case "client pause":
                await asyncio.to_thread(self.admin.client_pause, int(fault.amount * 1000), all=True)
                await asyncio.sleep(fault.amount)
                # It ends by the wall clock, which must not be set back meanwhile.
                await asyncio.to_thread(self.admin.ping)
            case "connections cut":
                await asyncio.to_thread(self.admin.client_kill_filter, _type="normal", skipme=True)
            case "server clock":
                self.clock(int(fault.amount))


class Replicated(Servers):
    """Servers of which one may take over from another."""

    @abstractmethod
    def client(self, server: EmbeddedValkey) -> Any:
        """A client of one of them."""

    def die_ahead(self, primary: EmbeddedValkey, replicas: list[EmbeddedValkey]) -> None:
        """The primary dies with writes that it has confirmed and its replicas have not heard of."""
        # They would come back at once if they could.
        for replica in replicas:
            replica.pause()
        try:
            self.client(primary).client_kill_filter(_type="replica", skipme=True)
            time.sleep(AHEAD)
            primary.kill()
        finally:
            for replica in replicas:
                replica.resume()

    async def on_one(self, server: EmbeddedValkey, kind: str) -> None:
        """What goes wrong with a single server."""
        client = self.client(server)
        if kind == "script flush":
            await asyncio.to_thread(client.script_flush)
        else:
            await asyncio.to_thread(client.client_kill_filter, _type="normal", skipme=True)


class Sentinels(Replicated):
    """A primary with two replicas, and three sentinels."""

    topology = SENTINEL

    def __enter__(self) -> Self:
        self.servers = self._stack.enter_context(EmbeddedSentinels(replicas=2, args=LASTING))
        return self

    @property
    def url(self) -> str:
        return self.servers.url

    def groups(self) -> list[Group]:
        return one_group()

    def client(self, server: EmbeddedValkey) -> Any:
        return self.servers.client(server)

    def primaries(self) -> Iterator[Any]:
        yield self.client(self.servers.primary())

    def serving(self) -> object:
        return [server.port for server in self.servers._named()] or None

    async def do(self, fault: Planned) -> None:
        primary = await asyncio.to_thread(self.servers.primary)
        match fault.kind:
            case "primary killed" | "primary killed ahead":
                if fault.kind == "primary killed ahead":
                    replicas = await asyncio.to_thread(self.servers.replicas)
                    await asyncio.to_thread(self.die_ahead, primary, replicas)
                else:
                    await asyncio.to_thread(primary.kill)
                await asyncio.to_thread(self.servers.await_switch, primary)
                self.unfinished += [lambda: time.sleep(fault.amount), lambda: self._again(primary)]
            case "primary stopped":
                await asyncio.to_thread(primary.pause)
                await asyncio.to_thread(self.servers.await_switch, primary)
                await asyncio.sleep(fault.amount)
                primary.resume()
                self.unfinished.append(self._together)
            case "failover":
                await asyncio.to_thread(self.servers.failover)
                self.unfinished.append(self._together)
            case "replica killed":
                replica = self._chance.choice(await asyncio.to_thread(self.servers.replicas))
                await asyncio.to_thread(replica.kill)
                await asyncio.sleep(fault.amount)
                self.unfinished.append(lambda: self._again(replica))
            case kind:
                await self.on_one(primary, kind)

    def _again(self, server: EmbeddedValkey) -> None:
        server.start()
        self._together()

    def _together(self) -> None:
        """Waits until all others copy the primary, so that the next fault finds somebody to take over."""
        begin = time.monotonic()
        while time.monotonic() < begin + LIMIT:
            primary = self.servers.primary()
            astray = [
                one for one in self.servers.servers if one is not primary and not self._copies(one, primary)
            ]
            if not astray:
                return
            # The sentinels do that, but may take their time after several failovers at once.
            if time.monotonic() > begin + PATIENCE:
                for server in astray:
                    with suppress(redis.RedisError):
                        self.client(server).replicaof("127.0.0.1", primary.port)
                time.sleep(1)
            time.sleep(0.05)
        raise ServerUnavailable(f"the replicas don't follow the primary within {LIMIT:g} s")

    def _copies(self, server: EmbeddedValkey, primary: EmbeddedValkey) -> bool:
        with suppress(redis.RedisError):
            role = self.client(server).execute_command("ROLE")
            return bool(role[0] == "slave" and int(role[2]) == primary.port and role[3] == "connected")
        return False


class Cluster(Replicated):
    """Three primaries with a replica each."""

    topology = CLUSTER
    primaries_count = 3

    def __enter__(self) -> Self:
        self.nodes = self._stack.enter_context(
            EmbeddedCluster(primaries=self.primaries_count, replicas=1, args=LASTING)
        )
        self._groups = groups_of(self.namespace, self.primaries_count)
        self._slots = sorted({slot_of(self.namespace, name) for group in self._groups for name in group["x"]})
        return self

    @property
    def url(self) -> str:
        return self.nodes.url

    def groups(self) -> list[Group]:
        return self._groups

    def client(self, server: EmbeddedValkey) -> Any:
        return self.nodes.client(server)

    def primaries(self) -> Iterator[Any]:
        for node in self.nodes._primaries():
            yield self.client(node)

    async def do(self, fault: Planned) -> None:
        slot = self._chance.choice(self._slots)
        primary = await asyncio.to_thread(self.nodes.node_of, slot)
        match fault.kind:
            case "slot moved":
                await asyncio.to_thread(self.nodes.migrate_slot, slot, self._other(primary))
            case "slot half moved":
                to = self._other(primary)
                await asyncio.to_thread(self.nodes.begin_migration, slot, to)
                await asyncio.sleep(fault.amount)
                await asyncio.to_thread(self.nodes.finish_migration, slot, to)
            case "primary killed" | "primary killed ahead":
                if fault.kind == "primary killed ahead":
                    replicas = await asyncio.to_thread(self.nodes.replicas_of, primary)
                    await asyncio.to_thread(self.die_ahead, primary, replicas)
                else:
                    await asyncio.to_thread(primary.kill)
                await asyncio.to_thread(self.nodes.await_takeover, primary, slot)
                self.unfinished += [lambda: time.sleep(fault.amount), lambda: self._again(primary)]
            case "failover":
                await asyncio.to_thread(self.nodes.failover, primary)
            case "replica killed":
                replica = self._chance.choice(await asyncio.to_thread(self.nodes.replicas_of, primary))
                await asyncio.to_thread(replica.kill)
                await asyncio.sleep(fault.amount)
                self.unfinished.append(lambda: self._again(replica))
            case kind:
                await self.on_one(primary, kind)

    def _other(self, primary: EmbeddedValkey) -> EmbeddedValkey:
        return self._chance.choice([node for node in self.nodes._primaries() if node is not primary])

    def _again(self, node: EmbeddedValkey) -> None:
        node.start()
        deadline = time.monotonic() + LIMIT
        while not self.nodes._settled():
            if time.monotonic() > deadline:
                raise ServerUnavailable(f"the cluster is not whole again within {LIMIT:g} s")
            time.sleep(0.05)


def servers_of(topology: str, namespace: str, seed: int, directory: Path) -> Servers:
    """The servers of a run, not started yet."""
    if topology == SENTINEL:
        return Sentinels(namespace, seed)
    if topology == CLUSTER:
        return Cluster(namespace, seed)
    return Standalone(namespace, seed, directory)
