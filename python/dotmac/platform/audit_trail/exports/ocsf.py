"""Events as OCSF 1.6 (Open Cybersecurity Schema Framework, https://schema.ocsf.io/1.6.0).

Classes by category and the words of the action:

    authentication                               Authentication (3002)
      action names password, mfa, account, user  Account Change (3001)
    authorization                                Authorize Session (3003)
      action grants or revokes                   User Access Management (3005)
    administration                               Account Change (3001) of a user or account,
                                                 User Access Management (3005) of roles and permissions,
                                                 else Entity Management (3004)
    configuration                                Entity Management (3004)
    data_access, data_change, privacy            Datastore Activity (6005)
    data_export                                  Web Resources Activity (6001), activity Export
    system, system_task, business                API Activity (6003)
    security                                     Detection Finding (2004)
    any, with an anomaly score that counts       Detection Finding (2004)

Where an event lacks what its class requires, it says so with the schema's own words: a user or a place of
"Unknown" type without a name would not be valid, so their `uid` or `name` is "unknown". All that has no
attribute in the schema stands in `unmapped`, under the names of the export's columns.
"""

from __future__ import annotations

import functools
import json
import re
from importlib import metadata as packages
from typing import Any, Final

__all__ = ["ANOMALY_SCORE", "VERSION", "ocsf_event"]

VERSION: Final = "1.6.0"
# From this score on, an event is a finding: the default of the setting `anomaly_threshold`.
ANOMALY_SCORE: Final = 0.5
_UNKNOWN: Final = "unknown"

_FINDING, _ACCOUNT, _AUTHENTICATION, _SESSION, _ENTITY, _ACCESS = 2004, 3001, 3002, 3003, 3004, 3005
_RESOURCES, _API, _DATASTORE = 6001, 6003, 6005
CLASS_NAMES: Final = {
    _FINDING: ("Findings", "Detection Finding"),
    _ACCOUNT: ("Identity & Access Management", "Account Change"),
    _AUTHENTICATION: ("Identity & Access Management", "Authentication"),
    _SESSION: ("Identity & Access Management", "Authorize Session"),
    _ENTITY: ("Identity & Access Management", "Entity Management"),
    _ACCESS: ("Identity & Access Management", "User Access Management"),
    _RESOURCES: ("Application Activity", "Web Resources Activity"),
    _API: ("Application Activity", "API Activity"),
    _DATASTORE: ("Application Activity", "Datastore Activity"),
}
_CLASS_OF: Final = {
    "authentication": _AUTHENTICATION,
    "authorization": _SESSION,
    "administration": _ENTITY,
    "configuration": _ENTITY,
    "data_access": _DATASTORE,
    "data_change": _DATASTORE,
    "privacy": _DATASTORE,
    "data_export": _RESOURCES,
    "security": _FINDING,
}
_GRANT_WORDS: Final = frozenset({"grant", "granted", "assign", "assigned", "add", "added"})
_REVOKE_WORDS: Final = frozenset({"revoke", "revoked", "unassign", "unassigned", "remove", "removed"})
_ACCESS_WORDS: Final = frozenset({"role", "roles", "permission", "permissions", "privilege", "privileges"})
_ACCOUNT_WORDS: Final = frozenset({"user", "users", "account", "accounts"})
_CREDENTIAL_WORDS: Final = frozenset({"password", "mfa", "otp", "lock", "locked", "unlock", "unlocked"})
_CREATE: Final = frozenset({"create", "created", "add", "added", "insert", "inserted", "new", "register"})
_READ: Final = frozenset({"read", "view", "viewed", "get", "fetch", "list", "access", "accessed", "open"})
_UPDATE: Final = frozenset({"update", "updated", "change", "changed", "edit", "edited", "set", "modify"})
_DELETE: Final = frozenset(
    {"delete", "deleted", "remove", "removed", "drop", "erase", "erased", "purge", "purged"}
)

# Per class: the words, and the activity that they mean; the first that matches.
_ACTIVITIES: Final[dict[int, tuple[tuple[frozenset[str], int, str], ...]]] = {
    _AUTHENTICATION: (
        (frozenset({"logout", "logoff", "signout"}), 2, "Logoff"),
        (frozenset({"login", "logon", "signin", "authenticate", "authenticated"}), 1, "Logon"),
        (frozenset({"token", "ticket"}), 3, "Authentication Ticket"),
        (frozenset({"impersonate", "impersonated", "switch", "sudo", "su"}), 7, "Account Switch"),
    ),
    _ACCOUNT: (
        (frozenset({"reset"}), 4, "Password Reset"),
        (frozenset({"password"}), 3, "Password Change"),
        (frozenset({"unlock", "unlocked"}), 12, "Unlock"),
        (frozenset({"lock", "locked"}), 9, "Lock"),
        (frozenset({"enable", "enabled", "activate", "activated"}), 2, "Enable"),
        (frozenset({"disable", "disabled", "suspend", "suspended", "deactivate"}), 5, "Disable"),
        (_CREATE, 1, "Create"),
        (_DELETE, 6, "Delete"),
    ),
    _SESSION: ((_GRANT_WORDS | {"authorize", "authorized", "access", "check"}, 1, "Assign Privileges"),),
    _ACCESS: (
        (_REVOKE_WORDS | _DELETE, 2, "Revoke Privileges"),
        (_GRANT_WORDS | _CREATE, 1, "Assign Privileges"),
    ),
    _ENTITY: (
        (_CREATE, 1, "Create"),
        (_DELETE, 4, "Delete"),
        (frozenset({"enable", "enabled"}), 8, "Enable"),
        (frozenset({"disable", "disabled"}), 9, "Disable"),
        (_UPDATE, 3, "Update"),
        (_READ, 2, "Read"),
    ),
    _DATASTORE: (
        (_CREATE, 6, "Create"),
        (_DELETE, 7, "Delete"),
        (frozenset({"write", "written", "save", "saved"}), 5, "Write"),
        (_UPDATE, 2, "Update"),
        (frozenset({"query", "search", "find"}), 4, "Query"),
        (frozenset({"list"}), 8, "List"),
        (_READ, 1, "Read"),
    ),
    _API: (
        (_CREATE, 1, "Create"),
        (_DELETE, 4, "Delete"),
        (_UPDATE, 3, "Update"),
        (_READ, 2, "Read"),
    ),
}
_DEFAULT_ACTIVITY: Final = {
    _RESOURCES: (7, "Export"),
    _FINDING: (1, "Create"),
}
_SEVERITY: Final = {
    "debug": (1, "Informational"),
    "info": (1, "Informational"),
    "warning": (3, "Medium"),
    "error": (4, "High"),
    "critical": (5, "Critical"),
}
_STATUS: Final = {"success": (1, "Success"), "failure": (2, "Failure"), "denied": (2, "Failure")}
_WORD: Final = re.compile(r"[a-z0-9]+")


def ocsf_event(row: dict[str, Any]) -> dict[str, Any]:
    """One event as OCSF.

    Args: row: the columns of an export; times in microseconds since 1970 (or ISO 8601), metadata and reasons
        as Python values.
    Returns: JSON types. Source: https://schema.ocsf.io/1.6.0.
    """
    words = frozenset(_WORD.findall(row["action"].lower()))
    kind = _class_of(row, words)
    activity, activity_name = _activity(kind, words)
    severity, severity_name = _SEVERITY.get(row["level"], (99, row["level"]))
    # A finding's status is what became of the finding, not how the event ended.
    status, status_name = (1, "New") if kind == _FINDING else _STATUS.get(row["outcome"], (0, "Unknown"))
    category_name, class_name = CLASS_NAMES[kind]
    told: dict[str, Any] = {
        "activity_id": activity,
        "activity_name": activity_name,
        "category_uid": kind // 1000,
        "category_name": category_name,
        "class_uid": kind,
        "class_name": class_name,
        "type_uid": kind * 100 + activity,
        "type_name": f"{class_name}: {activity_name}",
        "time": _millis(row["occurred_at"]),
        "severity_id": severity,
        "severity": severity_name,
        "status_id": status,
        "status": status_name,
        "message": row["action"],
        "metadata": _metadata(row),
    }
    if row["outcome"] != "success":
        told["status_detail"] = row["outcome"]
    told |= _BY_CLASS[kind](row)
    told["unmapped"] = _unmapped(row)
    return told


def _class_of(row: dict[str, Any], words: frozenset[str]) -> int:
    score = row.get("anomaly_score")
    if score is not None and score >= ANOMALY_SCORE:
        return _FINDING
    category = row["category"]
    about_access = bool(words & _ACCESS_WORDS) or row.get("resource_type") in _ACCESS_WORDS
    if category == "authentication" and words & _CREDENTIAL_WORDS:
        return _ACCOUNT
    if category in ("authorization", "administration"):
        if about_access and words & (_GRANT_WORDS | _REVOKE_WORDS):
            return _ACCESS
        if category == "administration":
            about_account = words & (_ACCOUNT_WORDS | _CREDENTIAL_WORDS)
            if about_account or row.get("resource_type") in _ACCOUNT_WORDS:
                return _ACCOUNT
    return _CLASS_OF.get(category, _API)


def _activity(kind: int, words: frozenset[str]) -> tuple[int, str]:
    if kind in _DEFAULT_ACTIVITY:
        return _DEFAULT_ACTIVITY[kind]
    for known, number, name in _ACTIVITIES[kind]:
        if words & known:
            return number, name
    return 99, "Other"


def _metadata(row: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {
        "version": VERSION,
        "product": {"name": "dotmac-platform", "vendor_name": "dotmac", "version": _own_version()},
        "uid": str(row["id"]),
        "event_code": row["action"],
        "log_name": "audit_events",
        "log_level": row["level"],
    }
    if row.get("recorded_at") is not None:
        told["logged_time"] = _millis(row["recorded_at"])
    if row.get("correlation_id") is not None:
        told["correlation_uid"] = row["correlation_id"]
    if row.get("tenant_id") is not None:
        told["tenant_uid"] = row["tenant_id"]
    return told


def _user(row: dict[str, Any]) -> dict[str, Any]:
    uid = row.get("user_id")
    if uid:
        return {"uid": uid}
    return {"uid": _UNKNOWN, "type_id": 0, "type": "Unknown"}


def _subject(row: dict[str, Any]) -> dict[str, Any]:
    """The user whom something was done to: the resource where that is one, else who acted."""
    if row.get("resource_type") in _ACCOUNT_WORDS and row.get("resource_id"):
        return {"uid": row["resource_id"]}
    return _user(row)


def _endpoint(row: dict[str, Any]) -> dict[str, Any]:
    return {"ip": row["ip_address"]} if row.get("ip_address") else {"name": _UNKNOWN}


def _who(row: dict[str, Any]) -> dict[str, Any]:
    """Who did it and where from, as far as it is known."""
    told: dict[str, Any] = {"actor": {"user": _user(row)}}
    if row.get("ip_address"):
        told["src_endpoint"] = _endpoint(row)
    return told


def _resource(row: dict[str, Any]) -> dict[str, Any]:
    told = {"name": row.get("resource_id") or row.get("resource_type") or _UNKNOWN}
    if row.get("resource_id"):
        told["uid"] = row["resource_id"]
    if row.get("resource_type"):
        told["type"] = row["resource_type"]
    return told


def _authentication(row: dict[str, Any]) -> dict[str, Any]:
    service = {"name": row.get("resource_id") or row.get("resource_type") or _UNKNOWN}
    return {"user": _user(row), "service": service, **_who(row)}


def _account(row: dict[str, Any]) -> dict[str, Any]:
    return {"user": _subject(row), **_who(row)}


def _session(row: dict[str, Any]) -> dict[str, Any]:
    return {"user": _subject(row), "privileges": [_privilege(row)], **_who(row)}


def _access(row: dict[str, Any]) -> dict[str, Any]:
    told = {"user": _subject(row), "privileges": [_privilege(row)], **_who(row)}
    if row.get("resource_type") not in _ACCOUNT_WORDS and row.get("resource_type"):
        told["resources"] = [_resource(row)]
    return told


def _privilege(row: dict[str, Any]) -> str:
    said = row.get("metadata") or {}
    for name in ("role", "permission", "privilege", "scope"):
        if isinstance(said.get(name), str):
            found: str = said[name]
            return found
    action: str = row["action"]
    return action


def _entity(row: dict[str, Any]) -> dict[str, Any]:
    return {"entity": _resource(row), **_who(row)}


def _datastore(row: dict[str, Any]) -> dict[str, Any]:
    name = row.get("resource_type") or row.get("resource_id") or _UNKNOWN
    told: dict[str, Any] = {
        "actor": {"user": _user(row)},
        "src_endpoint": _endpoint(row),
        "type_id": 3,
        "type": "Table",
        "table": {"name": name},
    }
    if row.get("resource_id"):
        told["table"]["uid"] = row["resource_id"]
    return told


def _resources(row: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"web_resources": [_resource(row)]}
    if row.get("ip_address"):
        told["src_endpoint"] = _endpoint(row)
    return told


def _api(row: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {
        "actor": {"user": _user(row)},
        "src_endpoint": _endpoint(row),
        "api": {"operation": row["action"]},
    }
    if row.get("resource_type") or row.get("resource_id"):
        told["resources"] = [_resource(row)]
    return told


def _finding(row: dict[str, Any]) -> dict[str, Any]:
    reasons = row.get("anomaly_reasons") or []
    about: dict[str, Any] = {"uid": str(row["id"]), "title": row["action"], "types": [row["category"]]}
    if reasons:
        about["desc"] = "; ".join(reasons)
    told: dict[str, Any] = {"finding_info": about}
    evidence: dict[str, Any] = {"actor": {"user": _user(row)}, "api": {"operation": row["action"]}}
    if row.get("ip_address"):
        evidence["src_endpoint"] = _endpoint(row)
    told["evidences"] = [evidence]
    if row.get("resource_type") or row.get("resource_id"):
        told["resources"] = [_resource(row)]
    score = row.get("anomaly_score")
    if score is not None:
        told["confidence_score"] = round(score * 100)
        told["is_alert"] = score >= ANOMALY_SCORE
    return told


_BY_CLASS: Final = {
    _AUTHENTICATION: _authentication,
    _ACCOUNT: _account,
    _SESSION: _session,
    _ACCESS: _access,
    _ENTITY: _entity,
    _DATASTORE: _datastore,
    _RESOURCES: _resources,
    _API: _api,
    _FINDING: _finding,
}
_UNMAPPED: Final = (
    "category",
    "outcome",
    "user_id",
    "resource_type",
    "resource_id",
    "ip_address",
    "trace_id",
    "span_id",
    "anomaly_score",
    "anomaly_reasons",
)


def _unmapped(row: dict[str, Any]) -> dict[str, Any]:
    told = {name: row[name] for name in _UNMAPPED if row.get(name) not in (None, [], ())}
    if row.get("metadata"):
        # As text: the schema's tools take `unmapped` for names and values, and metadata may nest.
        told["metadata"] = json.dumps(row["metadata"], ensure_ascii=False, separators=(",", ":"))
    return told


def _millis(value: Any) -> int:
    if isinstance(value, int):
        return value // 1000
    from datetime import datetime

    from dotmac.platform.audit_trail.ids import micros

    return micros(datetime.fromisoformat(value) if isinstance(value, str) else value) // 1000


@functools.cache
def _own_version() -> str:
    return packages.version("dotmac-platform")
