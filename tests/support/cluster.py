"""What the tests of clusters need: where the records of a lock are, and a look at them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from redis.crc import key_slot

from support.locks import Partition, until

if TYPE_CHECKING:
    from dotmac.platform.connection.embedded import EmbeddedValkey
    from dotmac.platform.distributed_locks import DistributedLockManager
    from dotmac.platform.testing.topologies import EmbeddedCluster

PARTITIONS = 64
NAMES = [f"user:{number}" for number in range(40)]


def partition_of(name: str) -> int:
    return key_slot(name.encode()) % PARTITIONS


def slot_of(namespace: str, name: str) -> int:
    return key_slot(f"{namespace}:{partition_of(name)}".encode())


def owner_of(cluster: EmbeddedCluster, namespace: str, name: str) -> EmbeddedValkey:
    """The node whose slot the lock's partition lies in."""
    return cluster.node_of(slot_of(namespace, name))


class View(Partition):
    """The records of a lock's partition at the node that has them now."""

    def __init__(self, cluster: EmbeddedCluster, namespace: str, name: str) -> None:
        super().__init__(owner_of(cluster, namespace, name).url, namespace, partition_of(name))


async def held_once(locks: DistributedLockManager, name: str) -> int:
    """The lock is held and given back; its fencing token. Without a list, which needs all partitions."""
    async with asyncio.timeout(30), locks.acquire_lock(name) as lock:
        assert lock.held
        return lock.fencing_token


def queued(cluster: EmbeddedCluster, namespace: str, name: str) -> int:
    node = owner_of(cluster, namespace, name)
    return int(cluster.client(node).zcard(f"{{{namespace}:{partition_of(name)}}}:q"))


async def copied(cluster: EmbeddedCluster, node: EmbeddedValkey) -> None:
    """Waits until a replica has everything that the primary has written by now."""
    client = cluster.client(node)
    written = client.info("replication")["master_repl_offset"]

    def done() -> bool:
        state = client.info("replication")
        return any(state[f"slave{n}"]["offset"] >= written for n in range(state["connected_slaves"]))

    await until(done)
