"""A month in the log of a clinic that takes cards: something for every section of every compliance report."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta

FIRST, LAST = date(2024, 3, 1), date(2024, 3, 31)
RECORDS = [
    {
        "name": "Patient care",
        "controller": "Clinic Ltd, 1 Main Street, privacy@clinic.example",
        "officer": "D. Officer, dpo@clinic.example",
        "purposes": ["treatment", "billing"],
        "subject_categories": ["patients"],
        "data_categories": ["health", "contact"],
        "recipients": ["insurer"],
        "transfers": ["none"],
        "safeguards": [],
        "time_limits": "10 years after the last treatment",
        "security_measures": ["encryption at rest", "role-based access"],
    },
    {
        "name": "Newsletter",
        "controller": "Clinic Ltd",
        "purposes": ["marketing"],
        "data_categories": ["contact"],
    },
]


async def tell(audit, tenant):
    """Log the story; returns how many events it has."""
    events = list(_events(tenant))
    await asyncio.gather(*(audit.log_event(*head, tenant_id=tenant, **fields) for head, fields in events))
    return len(events)


def _events(tenant):
    def at(day, hour=9, minute=0, second=0):
        return datetime(2024, 3, day, hour, minute, second, tzinfo=UTC)

    def event(when, category, action, **fields):
        return (category, action), {"occurred_at": when, **fields}

    people = ["ann", "bob", "carol", "dmitri", "Элена", "يوسف"]
    for day in range(1, 32):
        for number, who in enumerate(people):
            came = at(day, 7 + number % 3, (day * 7 + number * 11) % 60)
            yield event(
                came, "AUTHENTICATION", "user.login", user_id=who, ip_address=f"10.1.{number}.{day}",
                metadata={"user_agent": "Firefox/128", "method": "webauthn", "session_id": f"s{day}-{number}",
                          "application": "chart", "device": f"ws-{number}"},
            )  # fmt: skip
            for visit in range((day + number) % 4 + 1):
                patient = f"p{(day * 3 + number + visit) % 9}"
                yield event(
                    came + timedelta(minutes=10 + visit * 9), "DATA_ACCESS", "record.read", user_id=who,
                    ip_address=f"10.1.{number}.{day}", resource_type="record", resource_id=f"r{day}-{visit}",
                    metadata={"patient_id": patient, "data_category": "health", "purpose": "treatment"},
                )  # fmt: skip
        if day % 3 == 0:
            yield event(
                at(day, 3), "AUTHENTICATION", "user.login", outcome="failure", user_id="root",
                ip_address=f"198.51.100.{day}", metadata={"user_agent": "curl/8"},
            )  # fmt: skip
            yield event(
                at(day, 3, 1),
                "SECURITY",
                "firewall.blocked",
                outcome="denied",
                ip_address=f"203.0.113.{day}",
                metadata={"rule": "ssh"},
            )
        yield event(
            at(day, 2),
            "SYSTEM_TASK",
            "backup.run",
            outcome="failure" if day == 13 else "success",
            resource_type="database",
            resource_id="main",
        )
        if day < 29:
            yield event(
                at(day, 17),
                "ADMINISTRATION",
                "audit.review",
                user_id="carol",
                resource_type="audit_log",
                metadata={"period": f"2024-03-{day:02}", "findings": "none"},
            )
    yield event(
        at(4),
        "DATA_EXPORT",
        "record.export",
        user_id="bob",
        resource_type="record",
        resource_id="r1",
        metadata={
            "patient_id": "p3",
            "data_category": "health",
            "purpose": "billing",
            "recipient": "insurer",
        },
    )
    yield event(
        at(4, 11),
        "DATA_EXPORT",
        "record.export",
        user_id="bob",
        resource_type="record",
        resource_id="r2",
        metadata={
            "patient_id": "p3",
            "data_category": "contact",
            "purpose": "research",
            "recipient": "university",
        },
    )
    yield event(
        at(5),
        "DATA_CHANGE",
        "record.update",
        user_id="ann",
        resource_type="record",
        resource_id="r2",
        metadata={"patient_id": "p3", "data_category": "health", "purpose": "treatment"},
    )
    yield event(
        at(5, 12),
        "DATA_CHANGE",
        "record.print",
        user_id="ann",
        resource_type="record",
        resource_id="r2",
        metadata={"patient_id": "p3"},
    )
    yield event(
        at(6),
        "DATA_ACCESS",
        "record.break_glass",
        user_id="dmitri",
        resource_type="record",
        resource_id="r9",
        metadata={"patient_id": "p1", "justification": "unconscious in the emergency room"},
    )
    yield event(
        at(7),
        "ADMINISTRATION",
        "user.create",
        user_id="carol",
        resource_type="user",
        resource_id="newton",
        metadata={"requester": "ann", "approver": "bob", "ticket": "T-1", "role": "nurse"},
    )
    yield event(
        at(7, 10),
        "AUTHORIZATION",
        "role.grant",
        user_id="carol",
        metadata={
            "target_user": "newton",
            "role": "records.read",
            "requester": "ann",
            "approver": "carol",
            "ticket": "T-2",
        },
    )
    yield event(
        at(7, 11),
        "AUTHORIZATION",
        "role.grant",
        user_id="carol",
        metadata={
            "target_user": "ann",
            "role": "billing",
            "requester": "ann",
            "approver": "bob",
            "ticket": "T-3",
        },
    )
    yield event(
        at(8),
        "ADMINISTRATION",
        "user.disable",
        user_id="carol",
        resource_type="user",
        resource_id="mallory",
        metadata={"left_at": "2024-03-05T17:00:00Z", "ticket": "T-4"},
    )
    yield event(
        at(8, 12),
        "AUTHORIZATION",
        "role.revoke",
        user_id="carol",
        metadata={"target_user": "ann", "role": "billing", "left_at": "2024-03-08T11:00:00Z"},
    )
    yield event(
        at(9),
        "DATA_ACCESS",
        "record.read",
        user_id="mallory",
        ip_address="203.0.113.77",
        resource_type="record",
        resource_id="r7",
        metadata={"patient_id": "p7"},
    )
    yield event(
        at(10),
        "AUTHORIZATION",
        "access.review",
        user_id="carol",
        metadata={"target_user": "ann", "decision": "keep", "period": "2024-Q1", "findings": "none"},
    )
    yield event(
        at(11), "BUSINESS", "payment.create", user_id="bob", resource_type="payment", resource_id="pay-1"
    )
    yield event(
        at(11, 10), "BUSINESS", "payment.approve", user_id="bob", resource_type="payment", resource_id="pay-1"
    )
    for number in range(40):
        change = {
            "change_id": f"C-{number}",
            "author": "dmitri",
            "deployer": "ci",
            "environment": "production",
        }
        approver = {} if number == 5 else {"approver": "dmitri" if number == 6 else "ann"}
        yield event(
            at(1 + number % 28, 14, number),
            "CONFIGURATION",
            "change.deploy",
            user_id="ci",
            resource_type="service",
            resource_id="chart",
            metadata={**change, **approver},
        )
    yield event(
        at(12),
        "DATA_ACCESS",
        "card.read",
        user_id="bob",
        ip_address="10.1.1.12",
        resource_type="card",
        resource_id="tok_1",
        metadata={"data_category": "cardholder"},
    )
    yield event(
        at(12, 10), "DATA_ACCESS", "card.read", user_id="bob", resource_type="card", resource_id="tok_2"
    )
    yield event(at(12, 11), "SYSTEM", "audit.stop", resource_type="component", resource_id="gateway")
    yield event(at(12, 12), "SYSTEM", "audit.start", resource_type="component", resource_id="gateway")
    yield event(
        at(12, 13),
        "SYSTEM",
        "logging.failed",
        level="ERROR",
        outcome="failure",
        resource_type="component",
        resource_id="gateway",
        metadata={"duration": "PT1H", "cause": "disk full", "measures": "disk grown"},
    )
    yield event(
        at(12, 14), "SYSTEM", "table.create", user_id="carol", resource_type="table", resource_id="visits"
    )
    yield event(at(12, 15), "SYSTEM", "ntp.change", user_id="carol", resource_type="host", resource_id="db1")
    yield event(
        at(12, 16),
        "AUTHENTICATION",
        "password.change",
        user_id="ann",
        resource_type="credential",
        resource_id="ann",
    )
    yield event(
        at(12, 17),
        "DATA_ACCESS",
        "audit.read",
        user_id="carol",
        resource_type="audit_log",
        resource_id="2024-02",
    )
    for number in range(12):
        yield event(
            at(20, 8, number),
            "SECURITY",
            "data.breach",
            level="CRITICAL",
            correlation_id="b-7",
            resource_type="record",
            resource_id=f"r{number % 8}",
            metadata={
                "breach_id": "B-7",
                "subject_ids": [f"p{number % 5}", f"p{number % 3}"],
                "subject_category": "patients",
                "data_category": "health" if number % 2 else "contact",
                "nature": "a laptop was lost",
                "consequences": "disclosure",
                "measures": "remote wipe",
                "contact": "dpo@clinic.example",
                "aware_at": "2024-03-20T08:30:00Z",
            },
        )
    yield event(
        at(24, 10),
        "SECURITY",
        "breach.notified",
        correlation_id="b-7",
        metadata={
            "breach_id": "B-7",
            "notified_at": "2024-03-24T10:00:00Z",
            "reason_for_delay": "the extent was not known before",
        },
    )
    yield event(
        at(21),
        "PRIVACY",
        "subject.erasure",
        user_id="carol",
        metadata={
            "subject_id": "p2",
            "scope": "all personal fields",
            "key_destroyed_at": "2024-03-21T09:00:00Z",
        },
    )
    yield event(
        at(22),
        "PRIVACY",
        "subject.erasure",
        user_id="carol",
        outcome="denied",
        metadata={"subject_id": "p3", "scope": "all", "legal_hold": "case 12", "justification": "litigation"},
    )
    yield event(
        at(23),
        "BUSINESS",
        "credit.automated_decision",
        metadata={"subject_id": "p3", "purpose": "billing", "logic": "score under 300"},
    )
    yield event(
        at(25),
        "SECURITY",
        "incident.opened",
        level="ERROR",
        user_id="carol",
        metadata={"incident_id": "I-1", "owner": "carol"},
    )
    yield event(
        at(25, 10), "SECURITY", "incident.evaluated", user_id="carol", metadata={"incident_id": "I-1"}
    )
    yield event(
        at(25, 15),
        "SECURITY",
        "incident.contained",
        user_id="carol",
        metadata={"incident_id": "I-1", "measures": "account locked"},
    )
    yield event(at(26), "SECURITY", "incident.closed", user_id="carol", metadata={"incident_id": "I-1"})
