"""Fixtures of the lock tests: each test has a namespace of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dotmac.platform.connection.embedded import EmbeddedValkey
from support.locks import Partition, end_started, manager_at

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from dotmac.platform.distributed_locks import DistributedLockManager


@pytest.fixture
async def locks(valkey_url: str, unique: str) -> AsyncIterator[DistributedLockManager]:
    """A manager on the session's server."""
    async with manager_at(valkey_url, unique) as manager:
        yield manager


@pytest.fixture
def partition(valkey_url: str, unique: str) -> Iterator[Partition]:
    """The server's side of `locks`."""
    view = Partition(valkey_url, unique)
    yield view
    view.client.close()


@pytest.fixture
def own_valkey() -> Iterator[EmbeddedValkey]:
    """A server that this test may break."""
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    yield
    end_started()
