"""Fixtures of the lock tests: each test has a namespace of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from dotmac.platform.connection.embedded import EmbeddedValkey
from support.locks import Partition, end_started, manager_at
from support.owners import Owner, ProcessOwner, TaskOwner, ThreadOwner

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

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
async def owner(
    locks: DistributedLockManager, valkey_url: str, unique: str
) -> AsyncIterator[Callable[..., Owner]]:
    """Makes owners of this test's locks: `owner("task")`, `owner("thread")`, `owner("process")`."""
    made: list[Owner] = []

    def make(kind: str = "task", of: DistributedLockManager | None = None, **settings: object) -> Owner:
        if kind == "process":
            made.append(ProcessOwner(valkey_url, unique, settings))
        else:
            made.append({"task": TaskOwner, "thread": ThreadOwner}[kind](of or locks))
        return made[-1]

    yield make
    for one in made:
        await one.close()


@pytest.fixture(scope="session")
def redis_program() -> str:
    """Redis itself, 6.2 or later, as Debian's package `redis-server` installs it."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    found = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r" v=(\d+)\.(\d+)", found)
    if version is None or (int(version[1]), int(version[2])) < (6, 2):
        pytest.skip(f"{program} is no Redis of 6.2 or later: {found.strip()}")
    return program


@pytest.fixture(scope="session", params=["valkey", "redis"])
def each_program(request: pytest.FixtureRequest) -> str | None:
    """Every kind of server in turn: None for the wheel's Valkey, else the program of an installed Redis."""
    return None if request.param == "valkey" else request.getfixturevalue("redis_program")


@pytest.fixture
def each_server(each_program: str | None) -> Iterator[EmbeddedValkey]:
    """A server of every kind in turn, which this test may break."""
    with EmbeddedValkey(program=each_program) as server:
        yield server


@pytest.fixture
def own_valkey() -> Iterator[EmbeddedValkey]:
    """A server that this test may break."""
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, certificates of `localhost` and of a client by it, and another authority."""
    place = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=place, check=True, capture_output=True)

    (place / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    authority = ("-addext", "basicConstraints=critical,CA:TRUE", "-days", "2")
    for name in ("ca", "other"):
        openssl(
            "req",
            "-x509",
            *key,
            *authority,
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.pem",
            "-subj",
            f"/CN={name}",
        )
    signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
    for name in ("server", "client"):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.pem")
    return place


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    yield
    end_started()
