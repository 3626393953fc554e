"""Somebody tries stolen passwords at the login: the audit trail keeps every attempt and flags them."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import httpx

from dotmac.platform.cli.demo.traffic import SERVICE

if TYPE_CHECKING:
    from dotmac.platform.audit_trail import AuditAggregator
    from dotmac.platform.cli.demo.report import Report
    from dotmac.platform.service_registry import ServiceRegistry

__all__ = ["run"]

# Every address of 127.0.0.0/8 is this machine: the burst really comes from another one than the traffic.
ATTACKER = "127.0.0.66"
ATTEMPTS = 120
NAMES = 30
_AT_ONCE = 8
_THRESHOLD = 0.5


async def run(report: Report, registry: ServiceRegistry, audit: AuditAggregator) -> None:
    """Attack, then ask the audit trail.

    Args:
        report: where findings go.
        registry: how the service is found.
        audit: the trail that the service writes.
    """
    since = datetime.now(UTC)
    began = time.monotonic()
    refused = await _attack(registry)
    report.note(
        f"{ATTEMPTS} logins for {NAMES} names from {ATTACKER} within {time.monotonic() - began:.1f} s; "
        f"{refused} were refused"
    )
    attempts = await audit.query_events(
        since, categories=["AUTHENTICATION"], ip_address=ATTACKER, order="asc", limit=10_000
    )
    report.claim(
        len(attempts) == ATTEMPTS and all(event.outcome.name == "FAILURE" for event in attempts),
        f"all {len(attempts)} attempts are in the audit trail as failures, with their address",
    )
    flagged = [event for event in attempts if (event.anomaly_score or 0) >= _THRESHOLD]
    report.claim(bool(flagged), f"{len(flagged)} of them were flagged as anomalies when they were stored")
    if flagged:
        worst = max(flagged, key=lambda event: event.anomaly_score or 0)
        report.claim(
            any(ATTACKER in reason for reason in worst.anomaly_reasons),
            f"the worst has score {worst.anomaly_score:.2f} and the reasons: "
            + " | ".join(worst.anomaly_reasons),
        )
        first = attempts.index(flagged[0]) + 1
        report.note(f"the first that was flagged was attempt {first}")
    usual = await audit.query_events(categories=["AUTHENTICATION"], outcome="SUCCESS", limit=10_000)
    wrongly = [event for event in usual if (event.anomaly_score or 0) >= _THRESHOLD]
    report.claim(
        bool(usual) and not wrongly, f"none of the {len(usual)} successful logins of users was flagged"
    )


async def _attack(registry: ServiceRegistry) -> int:
    """Returns how many logins were refused."""
    gate = asyncio.Semaphore(_AT_ONCE)
    transport = httpx.AsyncHTTPTransport(local_address=ATTACKER)
    async with httpx.AsyncClient(transport=transport, timeout=30.0) as client:

        async def attempt(number: int) -> int:
            guess = {"username": f"user{number % NAMES:02}", "password": f"123456-{number}"}
            async with gate, registry.use_service(SERVICE) as instance:
                answer = await client.post(f"{instance.url}/login", json=guess)
            return answer.status_code

        statuses = await asyncio.gather(*(attempt(number) for number in range(ATTEMPTS)))
    return statuses.count(httpx.codes.UNAUTHORIZED)
