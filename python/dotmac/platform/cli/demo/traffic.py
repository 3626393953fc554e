"""HTTP traffic to three processes through discovery and balancing, one of which is killed meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

from dotmac.platform.cli.demo.processes import Server, serve, until

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Self

    from dotmac.platform.cli.demo.report import Report
    from dotmac.platform.service_registry import ServiceInstance, ServiceRegistry

__all__ = ["SERVICE", "Fleet", "password_of", "sign_in"]

SERVICE = "users"
TTL = 3.0
PROCESSES = 3
USERS = [f"user{number:02}" for number in range(12)]
_CLIENTS = 12
_BEFORE_KILL = 900
_AFTER_LEAVING = 300
# Longer than the lease of a lock that the killed process may have held.
_PATIENCE = 20.0
# Health checks are quicker as a rule; without them a registration ends with its ttl, give or take one look of
# the sweep and the way of the news.
_LEFT_WITHIN = TTL + 3.0


def password_of(user: str) -> str:
    """The password that the demo gives a user."""
    return f"the password of {user}"


@dataclass(frozen=True, slots=True)
class _Call:
    began: float
    instance: str
    operation: str
    failed: bool


class Fleet:
    """The example application in several processes.

    Args:
        report: where findings go.
        registry: how they are found.
        env: environment of the processes: addresses of the servers.
        logs: directory for what they write.
    """

    def __init__(self, report: Report, registry: ServiceRegistry, env: Mapping[str, str], logs: Path) -> None:
        self._report, self._registry, self._logs = report, registry, logs
        self._env = {
            **env,
            "APP_NAME": SERVICE,
            "DISTRIBUTED_LOCKS_DEFAULT_TIMEOUT": "5",
            "SERVICE_REGISTRY_DEFAULT_TTL": str(TTL),
            "SERVICE_REGISTRY_HEALTH_CHECK_INTERVAL": "0.5",
            "SERVICE_REGISTRY_HEALTH_CHECK_FALL": "2",
        }
        self._stack = ExitStack()
        self._servers: list[Server] = []
        self._calls: list[_Call] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._stack.close)

    async def start(self) -> None:
        """Start the processes and wait until all of them have registered."""
        began = time.monotonic()
        for number in range(PROCESSES):
            log = self._logs / f"{SERVICE}-{number + 1}.log"
            self._servers.append(
                self._stack.enter_context(serve("dotmac.platform.cli.demo.app:app", log, self._env))
            )
        await until(self._all_there, f"{PROCESSES} processes register (see {self._logs})")
        self._report.note(
            f"{PROCESSES} uvicorn processes registered themselves within {time.monotonic() - began:.1f} s: "
            + ", ".join(f"pid {server.process.pid} on port {server.port}" for server in self._servers)
        )

    async def _all_there(self) -> bool:
        for server in self._servers:
            if server.process.poll() is not None:
                raise RuntimeError(f"a server ended while starting; {server.log} says why")
        return len(await self._registry.discover_services(SERVICE)) == PROCESSES

    async def run(self) -> None:
        """Send traffic, kill one process, go on; check what became of every request."""
        async with httpx.AsyncClient(timeout=_PATIENCE) as client:
            for user in USERS:
                credentials = {"username": user, "password": password_of(user)}
                async with self._registry.use_service(SERVICE) as instance:
                    (await client.post(f"{instance.url}/users", json=credentials)).raise_for_status()
                await sign_in(self._report, self._registry, client, user)
            token = await sign_in(self._report, self._registry, client, USERS[0])
            client.headers["Authorization"] = f"Bearer {token}"
            stop = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                for number in range(_CLIENTS):
                    group.create_task(self._client(client, number, stop))
                try:
                    victim, killed, left, why = await self._kill_one()
                    enough = len(self._calls) + _AFTER_LEAVING
                    await until(lambda: len(self._calls) >= enough, "traffic after the kill")
                finally:
                    stop.set()
            self._judge(victim, killed, left, why)
            await self._judge_updates(client)

    async def _client(self, client: httpx.AsyncClient, number: int, stop: asyncio.Event) -> None:
        for turn in itertools.count():
            if stop.is_set():
                return
            user = USERS[(number + turn) % len(USERS)]
            began = time.monotonic()
            operation = "PUT /users/{id}" if turn % 5 == 0 else "GET /users/{id}"
            instance: ServiceInstance | None = None
            failed = False
            try:
                async with self._registry.use_service(SERVICE) as instance:
                    url = f"{instance.url}/users/{user}"
                    answer = await (
                        client.put(url, json={"seen": turn})
                        if operation.startswith("PUT")
                        else client.get(url)
                    )
                    answer.raise_for_status()
            except (httpx.TransportError, httpx.HTTPStatusError):
                failed = True
            else:
                self._report.timed(f"HTTP {operation}", time.monotonic() - began)
            assert instance is not None
            self._calls.append(_Call(began, instance.id, operation, failed))

    async def _kill_one(self) -> tuple[str, float, float, str]:
        """Returns the instance, when it was killed, when the registry no longer offered it, and why."""
        await until(lambda: len(self._calls) >= _BEFORE_KILL, "traffic before the kill")
        server = self._servers[0]
        found = await self._registry.discover_services(SERVICE)
        victim = next(instance.id for instance in found if instance.port == server.port)
        killed = time.monotonic()
        server.kill()

        async def gone() -> bool:
            found = await self._registry.discover_services(SERVICE)
            return victim not in {instance.id for instance in found}

        await until(gone, "the killed process leaves the rotation", step=0.005)
        left = time.monotonic()
        known = await self._registry.discover_services(SERVICE, healthy_only=False)
        unhealthy = victim in {instance.id for instance in known}
        return victim, killed, left, "two health checks failed" if unhealthy else "its registration ended"

    def _judge(self, victim: str, killed: float, left: float, why: str) -> None:
        before = [call for call in self._calls if call.began < killed]
        shares = Counter(call.instance for call in before)
        failed = [call for call in self._calls if call.failed]
        late = [call for call in self._calls if call.began > left]
        # A request that was on its way when the process died began before the kill.
        on_the_way = [call for call in failed if call.instance == victim and call.began < killed]
        meanwhile = [call for call in self._calls if killed <= call.began <= left]
        claim = self._report.claim
        claim(
            len(shares) == PROCESSES and min(shares.values()) > 0.25 * len(before),
            f"{len(before):,} requests were balanced over {PROCESSES} processes: "
            + ", ".join(f"{count:,}" for count in sorted(shares.values())),
        )
        claim(
            {call.instance for call in failed} <= {victim},
            f"only requests to the killed process failed: {len(failed)} of {len(self._calls):,} in all; "
            f"{len(on_the_way)} were on their way to it, {len(failed) - len(on_the_way)} of "
            f"{len(meanwhile):,} were sent to it before it left the rotation",
        )
        claim(
            left - killed < _LEFT_WITHIN,
            f"the killed process left the rotation {left - killed:.2f} s after SIGKILL "
            f"({why}; ttl {TTL:g} s, health checks every 0.5 s)",
        )
        claim(
            not any(call.failed or call.instance == victim for call in late),
            f"none of the {len(late):,} requests after that failed, and none went to it",
        )

    async def _judge_updates(self, client: httpx.AsyncClient) -> None:
        stored = 0
        for user in USERS:
            async with self._registry.use_service(SERVICE) as instance:
                answer = (await client.get(f"{instance.url}/users/{user}")).raise_for_status()
            stored += answer.json()["profile"].get("changes", 0)
        updates = [call for call in self._calls if call.operation.startswith("PUT")]
        confirmed = sum(not call.failed for call in updates)
        unknown = len(updates) - confirmed
        self._report.claim(
            confirmed <= stored <= confirmed + unknown,
            f"{confirmed} updates were confirmed, {unknown} were cut off, {stored} are stored: "
            "no confirmed one was overwritten by another process",
        )


async def sign_in(report: Report, registry: ServiceRegistry, client: httpx.AsyncClient, user: str) -> str:
    """Log in with the right password; the token."""
    began = time.monotonic()
    async with registry.use_service(SERVICE) as instance:
        answer = await client.post(
            f"{instance.url}/login", json={"username": user, "password": password_of(user)}
        )
    report.timed("HTTP POST /login", time.monotonic() - began)
    token: str = answer.raise_for_status().json()["token"]
    return token
