"""What happens to an event before anything else: it is filled in from the context, redacted, sealed."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from dotmac.platform.audit_trail.context import NO_CONTEXT, current_audit_context
from dotmac.platform.audit_trail.entry import parse_address
from dotmac.platform.audit_trail.redaction import Redactor, with_notes
from dotmac.platform.errors import InvalidArgument, InvalidEvent

if TYPE_CHECKING:
    from dotmac.platform.audit_trail.config import AuditTrailConfig
    from dotmac.platform.audit_trail.context import AuditContext
    from dotmac.platform.audit_trail.redaction import CompiledRules, RedactionRule

__all__ = ["Given", "needs_nothing", "protect", "redact", "redactor_of"]

_SEEN = frozenset(
    {
        "action",
        "user_id",
        "tenant_id",
        "resource_type",
        "resource_id",
        "correlation_id",
        "subject_id",
        "ip_address",
    }
)
_MOST_BITS = 256  # a longer number is no card, and no account
_PLAIN = frozenset({str, int, bool, type(None), UUID, IPv4Address, IPv6Address})
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
    """The arguments, filled in from `audit_context` and redacted by the category's rules. With personal data,
    `subject_id` is whom they are about.

    Raises: InvalidEvent: personal data about nobody, or that are no mapping; never shows a value of theirs.
    """
    context = current_audit_context()
    given = redact(redactor, category, given if context is NO_CONTEXT else _filled_in(given, context))
    return given if given.personal is None else _about_somebody(given)


def redact(redactor: Redactor, category: object, given: Given) -> Given:
    """The arguments, redacted by the category's rules; what was redacted is told in the metadata."""
    rules = redactor.of(category)
    if rules is not None and not (given.personal is None and _is_harmless(rules, given)):
        notes: dict[str, str] = {}
        changed: dict[str, Any] = {}
        for field in _TEXTS:
            value = getattr(given, field)
            if field != "action" and type(value) is not bool and isinstance(value, int):
                # A card's number is one as a number, too.
                value = str(int(value)) if value.bit_length() <= _MOST_BITS else None
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


def needs_nothing(redactor: Redactor, item: Mapping[str, Any]) -> bool:
    """A quick look at arguments as a mapping: `protect` would surely leave them as they are."""
    if type(item) is not dict or item.get("personal") is not None:
        return False
    if current_audit_context() is not NO_CONTEXT:
        return False
    rules = redactor.of(item.get("category"))
    if rules is None:
        return True
    seen = [value for name, value in item.items() if name in _SEEN]
    return _looks_plain(rules, seen, item.get("metadata"))


def _is_harmless(rules: CompiledRules, given: Given) -> bool:
    seen = [value for name, value in zip(Given._fields, given, strict=True) if name in _SEEN]
    return _looks_plain(rules, seen, given.metadata)


def _looks_plain(rules: CompiledRules, seen: list[Any], metadata: Any) -> bool:
    texts = [value for value in seen if type(value) is str]
    # What is neither a plain text nor surely none (Markup, an enumeration's member) is looked at properly.
    if len(texts) < len(seen) and not all(type(value) in _PLAIN for value in seen):
        return False
    return rules.finds_nothing(texts, metadata)


def _filled_in(given: Given, context: AuditContext) -> Given:
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
