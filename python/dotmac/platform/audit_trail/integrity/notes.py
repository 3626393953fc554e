"""Checkpoints as signed notes: what a tenant's log was, in a form that anybody's tools can check.

A checkpoint (C2SP tlog-checkpoint) says the name of a log, how many leaves it has and its Merkle root, and is
signed with Ed25519 (C2SP signed-note, signature type 0x01). The key's name is the log's.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from dotmac.platform.errors import InvalidCheckpoint

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "Checkpoint",
    "is_utf8",
    "key_id",
    "log_name",
    "open_note",
    "sign_text",
    "tenant_of",
    "verifier_key",
]

_ED25519 = b"\x01"
_DASH = "— "
_ID_BYTES = 4
_HASH_BYTES = 32
_MOST_SIGNATURES = 100
_MOST_BYTES = 1 << 20
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}")
_SIGNATURE = re.compile(f"{_DASH}(?P<name>[^\\s+]+) (?P<blob>[A-Za-z0-9+/]+={{0,2}})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A log at one size.

    Attributes: origin: the log's name. size: its leaves. root: its Merkle root, 32 bytes.
    """

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        """What is signed."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """Read a note's text; lines after the third are allowed and ignored.

        Raises: InvalidCheckpoint.
        """
        lines = text.split("\n")
        if len(lines) < 4 or lines[-1] or not all(lines[:-1]):  # noqa: PLR2004 (three lines, each ended)
            raise InvalidCheckpoint("a checkpoint has three lines at least: origin, size, root")
        origin, size, root = lines[:3]
        if _DECIMAL.fullmatch(size) is None:
            raise InvalidCheckpoint(f"the checkpoint's size {size[:40]!r} is not a decimal number")
        made = cls(origin, int(size), _base64(root, "root"))
        if len(made.root) != _HASH_BYTES:
            raise InvalidCheckpoint(f"the checkpoint's root has {len(made.root)} bytes, not {_HASH_BYTES}")
        return made


def log_name(trail: str, tenant: str) -> str:
    """The name of a tenant's log, the first line of its checkpoints: the trail's, a slash, the tenant's."""
    return f"{trail}/{quote(tenant, safe='')}" if tenant else trail


def tenant_of(trail: str, name: str) -> str | None:
    """The tenant whose log in that trail has that name; None for another trail's log."""
    if name == trail:
        return ""
    inside = name.removeprefix(f"{trail}/")
    if inside == name or "/" in inside:
        return None
    tenant = unquote(inside)
    # No other spelling of it, and none that no tenant can have.
    return tenant if log_name(trail, tenant) == name and "\0" not in tenant else None


def key_id(name: str, public_key: bytes) -> bytes:
    """The four bytes by which a signature names its key."""
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + public_key).digest()[:_ID_BYTES]


def verifier_key(name: str, public_key: bytes) -> str:
    """The key in the form that note verifiers read: `<name>+<id>+<key>`."""
    encoded = base64.b64encode(_ED25519 + public_key).decode()
    return f"{name}+{key_id(name, public_key).hex()}+{encoded}"


def sign_text(text: str, name: str, public_key: bytes, signature: bytes) -> str:
    """The note: the text, and the line with its signature."""
    blob = base64.b64encode(key_id(name, public_key) + signature).decode()
    return f"{text}\n{_DASH}{name} {blob}\n"


def open_note(note: str, keys: Iterable[bytes]) -> tuple[Checkpoint, bytes]:
    """Check a note against public keys.

    Args:
        note: the whole signed note.
        keys: 32-byte Ed25519 public keys that are trusted.
    Returns: the checkpoint, and the key that signed it.
    Raises: InvalidCheckpoint: not a note, no signature by one of the keys (`reason` "unknown_key"), or one
        that does not hold (`reason` "signature").
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    text, signatures = _split(note)
    checkpoint = Checkpoint.parse(text)
    found = None
    for key in keys:
        wanted = (checkpoint.origin, key_id(checkpoint.origin, key))
        for name, blob in signatures:
            if (name, blob[:_ID_BYTES]) != wanted:
                continue
            try:
                Ed25519PublicKey.from_public_bytes(key).verify(blob[_ID_BYTES:], text.encode())
            except InvalidSignature:
                raise InvalidCheckpoint(
                    f"the signature of {checkpoint.origin} at size {checkpoint.size} does not hold",
                    reason="signature",
                ) from None
            found = key
    if found is None:
        raise InvalidCheckpoint(
            f"{checkpoint.origin} at size {checkpoint.size} is not signed with a key that is trusted",
            reason="unknown_key",
        )
    return checkpoint, found


def is_utf8(text: str) -> bool:
    """Has it no lone surrogates, which JSON can carry?"""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _split(note: str) -> tuple[str, list[tuple[str, bytes]]]:
    if not is_utf8(note):
        raise InvalidCheckpoint("a signed note is UTF-8")
    if len(note) > _MOST_BYTES or any(letter < " " and letter != "\n" for letter in note):
        raise InvalidCheckpoint("a signed note has no control characters and at most 1 MiB")
    head, blank, tail = note.rpartition("\n\n")
    if not blank or not tail.endswith("\n"):
        raise InvalidCheckpoint("a signed note has a text, an empty line and signatures")
    lines = tail[:-1].split("\n")
    if len(lines) > _MOST_SIGNATURES:
        raise InvalidCheckpoint(f"{len(lines)} signatures are more than the {_MOST_SIGNATURES} allowed")
    signatures = []
    for line in lines:
        match = _SIGNATURE.fullmatch(line)
        if match is None:
            raise InvalidCheckpoint(f"{line[:80]!r} is not a signature line")
        signatures.append((match["name"], _base64(match["blob"], "signature")))
    return head + "\n", signatures


def _base64(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidCheckpoint(f"the {what} {text[:80]!r} is not base64") from None
