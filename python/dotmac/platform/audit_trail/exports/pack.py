"""An event's columns in the form in which `_native.AuditEntry.from_row` takes them."""

from __future__ import annotations

import ipaddress
import struct
from typing import Any, Final

from dotmac.platform._native import AUDIT_COLUMNS
from dotmac.platform.audit_trail.ids import POSTGRES_EPOCH

__all__ = ["packed"]

# PostgreSQL's binary form, as COPY has it: a length, or -1 for NULL, then the value.
_OWN: Final = tuple(name for name in AUDIT_COLUMNS if name not in ("segment", "leaf"))
_NULL: Final = b"\xff\xff\xff\xff"
_JSONB: Final = b"\x01"
_FAMILIES: Final = {4: 2, 6: 3}


def packed(fields: dict[str, Any]) -> bytes:
    """The row of `fields`, as `AuditEntry.fields` gives them."""
    out = []
    for name in _OWN:
        value = fields[name]
        if value is None:
            out.append(_NULL)
            continue
        data = _value(name, value)
        out += (struct.pack(">i", len(data)), data)
    return b"".join(out)


def _value(name: str, value: Any) -> bytes:
    if name == "occurred_at":
        return struct.pack(">q", value - POSTGRES_EPOCH)
    if name == "id":
        return int(value).to_bytes(16)
    if name == "anomaly_score":
        return struct.pack(">d", value)
    text: str = value
    if name in ("metadata", "personal", "anomaly_reasons"):
        return _JSONB + text.encode()
    if name == "ip_address":
        address = ipaddress.ip_address(text)
        head = bytes((_FAMILIES[address.version], address.max_prefixlen, 0, len(address.packed)))
        return head + address.packed
    return text.encode()
