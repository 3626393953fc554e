"""Events as OCSF.

Promises:
- an event of every category, level and outcome, with and without each of its fields, fits OCSF's own schema
  of its class (the package ocsf-json-schema holds what https://schema.ocsf.io serves), constraints included;
- the documented table of classes and activities holds;
- nothing is lost: what has no place in the schema is in `unmapped`.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import cache
from uuid import uuid4

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema

from dotmac.platform.audit_trail import AuditCategory, AuditLevel, AuditOutcome
from dotmac.platform.audit_trail.exports.ocsf import CLASS_NAMES, VERSION, ocsf_event


@cache
def schema():
    return OcsfJsonSchemaEmbedded(get_ocsf_schema(VERSION))


@cache
def validator(class_uid):
    known = schema().get_class_schema(schema().lookup_class_name_from_uid(class_uid))
    return jsonschema.Draft202012Validator(known)


def check(told):
    kind = told["class_uid"]
    validator(kind).validate(told)
    definition = schema().schema.schema["classes"][schema().lookup_class_name_from_uid(kind)]
    # What JSON Schema can't say about a class or an object.
    constraints(definition, told)
    for name, object_name in (("user", "user"), ("src_endpoint", "network_endpoint"), ("actor", "actor")):
        if name in told:
            constraints(schema().schema.schema["objects"][object_name], told[name])
    enums = definition["attributes"]
    for name in ("activity_id", "severity_id", "status_id"):
        assert str(told[name]) in enums[name]["enum"]
        said = enums[name]["enum"][str(told[name])]["caption"]
        shown = told[{"activity_id": "activity_name", "severity_id": "severity", "status_id": "status"}[name]]
        assert shown == said or told[name] == 99
    assert told["type_uid"] == kind * 100 + told["activity_id"]
    assert told["category_uid"] == definition.get("category_uid", kind // 1000)
    json.dumps(told)


def constraints(definition, value):
    known = definition.get("constraints") or {}
    if names := known.get("at_least_one"):
        assert any(name in value for name in names), (names, value)
    if names := known.get("just_one"):
        assert sum(name in value for name in names) == 1, (names, value)


def row(**given):
    made = dict.fromkeys(
        ("user_id", "tenant_id", "resource_type", "resource_id", "ip_address", "correlation_id", "trace_id",
         "span_id",
         "anomaly_score")
    ) | {
        "id": str(uuid4()), "occurred_at": 1_767_323_045_000_006, "recorded_at": 1_767_323_045_100_000,
        "category": "system", "action": "x", "level": "info", "outcome": "success", "metadata": {},
        "anomaly_reasons": [],
    }  # fmt: skip
    return made | given


words = st.sampled_from(
    ["user", "role", "login", "logout", "grant", "revoke", "create", "delete", "read", "update", "password",
    "reset",
     "lock", "export", "x", "failed", "query", "list", "enable", "disable", "token", "=1"]
)  # fmt: skip
maybe = st.none() | st.sampled_from(["", "7", "user", "role", "table", "ada"])


@given(
    category=st.sampled_from(AuditCategory),
    level=st.sampled_from(AuditLevel),
    outcome=st.sampled_from(AuditOutcome),
    action=st.lists(words, min_size=1, max_size=4).map(".".join),
    user_id=maybe,
    tenant_id=maybe,
    resource_type=maybe,
    resource_id=maybe,
    correlation_id=maybe,
    ip_address=st.none() | st.ip_addresses().map(str),
    metadata=st.dictionaries(st.sampled_from(["role", "n"]), st.none() | st.integers() | st.text(max_size=5)),
    anomaly_score=st.none() | st.floats(0, 1),
    anomaly_reasons=st.lists(st.text(max_size=10), max_size=2),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_event_fits_the_schema(**given):
    given |= {name: given[name].value for name in ("category", "level", "outcome")}
    check(ocsf_event(row(**given)))


def test_events_of_later_versions_fit_too():
    check(ocsf_event(row(category="quantum", level="notice", outcome="pending")))


@pytest.mark.parametrize(
    ("given", "kind", "activity"),
    [
        ({"category": "authentication", "action": "user.login"}, 3002, "Logon"),
        ({"category": "authentication", "action": "user.logout"}, 3002, "Logoff"),
        ({"category": "authentication", "action": "token.issued"}, 3002, "Authentication Ticket"),
        ({"category": "authentication", "action": "user.password.reset"}, 3001, "Password Reset"),
        ({"category": "authorization", "action": "access.denied"}, 3003, "Assign Privileges"),
        ({"category": "authorization", "action": "role.granted"}, 3005, "Assign Privileges"),
        ({"category": "administration", "action": "role.revoke"}, 3005, "Revoke Privileges"),
        ({"category": "administration", "action": "user.create"}, 3001, "Create"),
        ({"category": "administration", "action": "quota.update"}, 3004, "Update"),
        ({"category": "configuration", "action": "setting.update"}, 3004, "Update"),
        ({"category": "data_access", "action": "patient.read"}, 6005, "Read"),
        ({"category": "data_change", "action": "invoice.delete"}, 6005, "Delete"),
        ({"category": "privacy", "action": "subject.erase"}, 6005, "Delete"),
        ({"category": "data_export", "action": "report.download"}, 6001, "Export"),
        ({"category": "system", "action": "started"}, 6003, "Other"),
        ({"category": "system_task", "action": "index.create"}, 6003, "Create"),
        ({"category": "business", "action": "order.read"}, 6003, "Read"),
        ({"category": "security", "action": "scan"}, 2004, "Create"),
        ({"category": "business", "action": "x", "anomaly_score": 0.7}, 2004, "Create"),
        ({"category": "business", "action": "x", "anomaly_score": 0.4}, 6003, "Other"),
    ],
)
def test_the_table_of_classes(given, kind, activity):
    told = ocsf_event(row(**given))
    assert (told["class_uid"], told["activity_name"]) == (kind, activity)
    assert CLASS_NAMES[kind][1] == told["class_name"]
    check(told)


def test_nothing_is_lost():
    told = ocsf_event(
        row(
            category="data_access", action="a", user_id="ada", tenant_id="acme", ip_address="192.0.2.7",
            correlation_id="c", trace_id="t", span_id="s", metadata={"k": [1, {"x": None}]},
            anomaly_score=0.1, outcome="denied",
        )
    )  # fmt: skip
    assert told["time"] == 1_767_323_045_000
    assert told["metadata"]["logged_time"] == 1_767_323_045_100
    assert told["metadata"]["tenant_uid"] == "acme"
    assert told["metadata"]["correlation_uid"] == "c"
    assert told["actor"]["user"] == {"uid": "ada"}
    assert told["src_endpoint"] == {"ip": "192.0.2.7"}
    assert (told["status_id"], told["status_detail"]) == (2, "denied")
    assert json.loads(told["unmapped"]["metadata"]) == {"k": [1, {"x": None}]}
    assert {"trace_id", "span_id", "anomaly_score", "category"} <= set(told["unmapped"])
    said = ocsf_event(row(occurred_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).isoformat()))
    assert said["time"] == 1_767_323_045_000
