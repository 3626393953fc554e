"""Personal data as ciphertext: one field at a time, bound to its event, its subject and its name.

AES-256-GCM under a key of the subject's own and random nonces of 96 bits. A nonce that came twice would
betray both texts: under one key that takes about 2^32 fields (NIST SP 800-38D, section 8.3), which no
person's events have; the system's random numbers are fork-safe. So GCM-SIV, which many OpenSSL lack, is not
needed. The text is filled up with blanks, so that its length tells little.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from typing import TYPE_CHECKING, Any

from dotmac.platform.errors import InvalidEvent

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

__all__ = ["MAX_FIELDS", "SealedField", "check_personal", "open_fields", "seal_fields"]

MAX_FIELDS = 100
MAX_NAME = 128
MAX_BYTES = 256 << 10
_VERSION = b"\x01"
_NONCE_BYTES = 12
_BLOCK = 32
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class SealedField(ValueError):
    """A field's ciphertext does not open: it is not what was stored for this event."""


def check_personal(value: Mapping[str, Any]) -> dict[str, bytes]:
    """Each field as JSON text.

    Raises: InvalidEvent: names the field and what would be right, and never shows a value.
    """
    if len(value) > MAX_FIELDS:
        raise InvalidEvent(f"personal: {len(value)} fields are not allowed; at most {MAX_FIELDS} are")
    found: dict[str, bytes] = {}
    size = 0
    for name, item in value.items():
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise InvalidEvent(f"personal: give every field a printable name of 1 to {MAX_NAME} characters")
        try:
            found[name] = _ENCODER.encode(item).encode()
        except UnicodeEncodeError:
            raise InvalidEvent(f"personal.{name}: half of a surrogate pair; give valid Unicode") from None
        except (TypeError, ValueError, RecursionError):
            kind = type(item).__name__
            raise InvalidEvent(
                f"personal.{name}: a {kind} that is not JSON; give a string, number, list or dict"
            ) from None
        size += len(found[name])
    if size > MAX_BYTES:
        raise InvalidEvent(f"personal: {size} bytes of JSON are not allowed; at most {MAX_BYTES} are")
    return found


def seal_fields(aead: Any, event: UUID, subject: str, fields: Mapping[str, bytes]) -> dict[str, str]:
    """Ciphertext in base64 for each field's JSON text."""
    sealed = {}
    for name, text in fields.items():
        nonce = os.urandom(_NONCE_BYTES)
        padded = text + b" " * (-len(text) % _BLOCK)
        raw = _VERSION + nonce + aead.encrypt(nonce, padded, _bound(event, subject, name))
        sealed[name] = base64.b64encode(raw).decode()
    return sealed


def open_fields(aead: Any, event: UUID, subject: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """What `seal_fields` was given, decoded. Raises: SealedField: it was changed, or moved from elsewhere."""
    from cryptography.exceptions import InvalidTag

    found = {}
    for name, text in fields.items():
        try:
            raw = base64.b64decode(text, validate=True)
            if raw[:1] != _VERSION:
                raise ValueError("an unknown version")  # noqa: TRY301 (as what does not open)
            nonce, sealed = raw[1 : 1 + _NONCE_BYTES], raw[1 + _NONCE_BYTES :]
            found[name] = json.loads(aead.decrypt(nonce, sealed, _bound(event, subject, name)))
        except (InvalidTag, ValueError, TypeError, binascii.Error) as error:
            raise SealedField(f"{name}: {type(error).__name__}") from None
    return found


def _bound(event: UUID, subject: str, name: str) -> bytes:
    """Associated data: what the ciphertext belongs to; a length before each part, so that none runs over."""
    parts = (b"dotmac personal v1", event.bytes, subject.encode(), name.encode())
    return b"".join(len(part).to_bytes(4) + part for part in parts)
