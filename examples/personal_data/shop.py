"""A customer's data in the audit trail: stored encrypted, handed out on request, erased on request.

AUDIT_TRAIL_PERSONAL_KEY=$(dotmac audit new-personal-key) python shop.py ada
"""

import asyncio
import sys

from dotmac.platform.audit_trail import AuditAggregator, audit_context

audit = AuditAggregator(decrypt_personal=True)


async def change_address(customer: str, city: str) -> None:
    """Somebody of the support does it for the customer, whose data these are."""
    await audit.log_event(
        "DATA_CHANGE",
        "customer.update",
        subject_id=customer,
        resource_type="customer",
        resource_id=customer,
        personal={"city": city, "email": f"{customer}@example.com"},
        metadata={"purpose": "support", "api_token": "is masked"},
    )


async def show(customer: str) -> None:
    """What the trail tells who may read personal data."""
    for event in await audit.query_events(actions="customer.update", resource_id=customer, order="asc"):
        print(
            event.action, "by", event.user_id, "token:", event.metadata["api_token"], "data:", event.personal
        )


async def main(customer: str) -> None:
    """The life of a customer's data."""
    async with audit:
        # Outside of a demonstration `dotmac db upgrade` does this, when a version is rolled out.
        await audit.migrate()
        with audit_context(user_id="support-7", correlation_id="ticket-4711"):
            await change_address(customer, "London")
            await change_address(customer, "Turin")
        await show(customer)
        with audit_context(user_id="dpo"):
            summary = await audit.export_subject_access(customer, f"{customer}.html")
            print(f"{summary.events} events in {customer}.html")
            done = await audit.erase_subject(customer, reason="request of the customer")
        print(f"erased: {done.fields} fields of {done.events} events; certificate {done.certificate}")
        await show(customer)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
