"""What happens to an event before anything else: it is filled in from the context, redacted, sealed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from dotmac.platform.audit_trail.entry import parse_address
from dotmac.platform.audit_trail.redaction import MOST_BITS, Redactor, with_notes
from dotmac.platform.errors import InvalidArgument, InvalidEvent

if TYPE_CHECKING:
    from dotmac.platform.audit_trail.config import AuditTrailConfig
    from dotmac.platform.audit_trail.context import AuditContext
    from dotmac.platform.audit_trail.redaction import RedactionRule

__all__ = ["Given", "filled_in", "protect", "redact", "redactor_of"]

_TEXTS = ("action", "user_id", "tenant_id", "resource_type", "resource_id", "correlation_id", "subject_id")


class Given(NamedTuple):
    """The arguments of `log_event` that say who, where and about what, checked by nobody yet."""

    action: Any
    user_id: Any = None
    tenant_id: Any = None
    resource_type: Any = None
    resource_id: Any = None
    ip_address: Any = None
    correlation_id: Any = None
    metadata: Any = None
    personal: Any = None
    subject_id: Any = None


def protect(redactor: Redactor, category: object, given: Given) -> Given:
    """The arguments, redacted by the category's rules. With personal data, `subject_id` is whom they are
    about.

    Raises: InvalidEvent: personal data about nobody, or that are no mapping; never shows a value of theirs.
    """
    given = redact(redactor, category, given)
    return given if given.personal is None else _about_somebody(given)


def redact(redactor: Redactor, category: object, given: Given) -> Given:
    """The arguments, redacted by the category's rules; what was redacted is told in the metadata."""
    rules = redactor.of(category)
    if rules is not None:
        notes: dict[str, str] = {}
        changed: dict[str, Any] = {}
        for field in _TEXTS:
            value = getattr(given, field)
            if field != "action" and type(value) is not bool and isinstance(value, int):
                # A card's number is one as a number, too.
                value = str(int(value)) if value.bit_length() <= MOST_BITS else None
            if isinstance(value, str):
                found = rules.text(field, value, notes)
                if found != value:
                    changed[field] = found
        if isinstance(given.ip_address, str) and parse_address(given.ip_address) is None:
            # Refused later, by an error that shows it.
            changed["ip_address"] = rules.text("ip_address", given.ip_address, {})
        for field in ("metadata", "personal"):
            value = getattr(given, field)
            if isinstance(value, Mapping):
                tree = rules.mapping(value, field, notes)
                if tree is not value:
                    changed[field] = tree
        if changed:
            given = given._replace(**changed)
        if isinstance(given.metadata, Mapping) or (notes and given.metadata is None):
            given = given._replace(metadata=with_notes(given.metadata, notes))
    return given


def filled_in(given: Given, context: AuditContext) -> Given:
    """The arguments, with those that were left out from the context."""
    missing: dict[str, Any] = {
        name: value
        for name in ("user_id", "tenant_id", "correlation_id")
        if getattr(given, name) is None and (value := getattr(context, name)) is not None
    }
    if given.ip_address is None and context.ip_address is not None:
        own = given.metadata.get("ip_address") if isinstance(given.metadata, Mapping) else None
        if parse_address(own) is None:
            missing["ip_address"] = context.ip_address
    if context.metadata and (given.metadata is None or isinstance(given.metadata, Mapping)):
        missing["metadata"] = {**context.metadata, **(given.metadata or {})}
    return given._replace(**missing) if missing else given


def _about_somebody(given: Given) -> Given:
    if not isinstance(given.personal, Mapping):
        raise InvalidEvent(
            f"personal: a {type(given.personal).__name__} is not allowed; give a mapping of fields"
        )
    if not given.personal:
        return given._replace(personal=None)
    if given.subject_id is None:
        if given.user_id is None:
            raise InvalidEvent(
                "subject_id: personal data belong to somebody, by whose key they are sealed; "
                "give subject_id or user_id"
            )
        return given._replace(subject_id=given.user_id)
    return given


def redactor_of(section: AuditTrailConfig, rules: tuple[RedactionRule, ...] | None) -> Redactor:
    """The configuration's rules, after those given in code."""
    from dotmac.platform.audit_trail.redaction import rules_from_json

    key = section.redact_hash_key.get_secret_value() if section.redact_hash_key is not None else None
    configured = rules_from_json(section.redact_rules) if section.redact_rules else ()
    try:
        return Redactor(
            (*(rules or ()), *configured),
            secrets=section.redact_secrets,
            keep=[name for name in (section.redact_keep or "").split(",") if name.strip()],
            hash_key=key.encode() if key is not None else None,
        )
    except (TypeError, AttributeError):
        raise InvalidArgument("redaction", type(rules), "give a list of RedactionRule") from None
