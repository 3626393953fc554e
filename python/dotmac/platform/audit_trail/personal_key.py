"""The key-encryption key: wraps the keys of subjects, and is kept outside of the database.

It is 32 bytes of the configuration's, or a service's (KMS) that wraps and unwraps without giving it away.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import inspect
import os
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from dotmac.platform.errors import InvalidArgument, KeyServiceUnavailable, MissingExtra, PersonalKeyMissing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

__all__ = ["KeyRing", "KeyService", "LocalKey", "aes_gcm", "check_key", "new_personal_key"]

KEY_BYTES = 32
_NONCE_BYTES = 12


@runtime_checkable
class KeyService(Protocol):
    """Something that wraps keys, such as a KMS. The methods may be async; those that are not run in threads.
    Several may be called at once.

    Attributes: name: of the key that wraps now; stored beside what it wrapped, so that it can be rotated.
    """

    name: str

    def wrap(self, key: bytes, context: Mapping[str, str]) -> Awaitable[bytes] | bytes:
        """The wrapped key; it can only be unwrapped with the same context (AWS: encryption context)."""

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> Awaitable[bytes] | bytes:
        """What `wrap` was given."""


def new_personal_key() -> str:
    """A new key-encryption key for `AUDIT_TRAIL_PERSONAL_KEY`: 32 random bytes in base64."""
    return base64.b64encode(os.urandom(KEY_BYTES)).decode()


def aes_gcm(key: bytes) -> Any:
    """AES-256-GCM. Raises: MissingExtra: the extra `privacy` is not installed."""
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise MissingExtra(
            "personal data needs cryptography: pip install 'dotmac-platform[privacy]'"
        ) from None
    return AESGCM(key)


class LocalKey:
    """A key-encryption key that this process holds.

    Args:
        key: 32 bytes, or their text in base64 or hexadecimal digits.

    Raises: InvalidArgument: something else; never shows it.
    """

    def __init__(self, key: bytes | str) -> None:
        raw = check_key(key)
        self.name = "local:" + hashlib.sha256(b"dotmac personal key v1\x00" + raw).hexdigest()[:16]
        self._aead = aes_gcm(raw)

    def wrap(self, key: bytes, context: Mapping[str, str]) -> bytes:
        """By AES-256-GCM under a random nonce: one per subject, far from the 2^32 of NIST SP 800-38D, 8.3."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + bytes(self._aead.encrypt(nonce, key, _bound(context)))

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """The key. Raises: ValueError: it was wrapped by another key, for another subject, or changed."""
        from cryptography.exceptions import InvalidTag

        try:
            return bytes(self._aead.decrypt(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], _bound(context)))
        except (InvalidTag, ValueError):
            raise ValueError("the wrapped key does not fit") from None


def check_key(key: bytes | str) -> bytes:
    """The key's bytes. Raises: InvalidArgument: it is none; never shows it."""
    raw = _decoded(key) if isinstance(key, str) else key
    if not isinstance(raw, bytes) or len(raw) != KEY_BYTES:
        right = f"give {KEY_BYTES} random bytes in base64: `dotmac audit new-personal-key` makes some"
        raise InvalidArgument("personal_key", "***", right)
    return raw


def _bound(context: Mapping[str, str]) -> bytes:
    return "\x00".join(f"{name}={context[name]}" for name in sorted(context)).encode()


def _decoded(text: str) -> bytes | None:
    text = text.strip()
    try:
        if len(text) == 2 * KEY_BYTES:
            return bytes.fromhex(text)
        return base64.b64decode(
            text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4), validate=True
        )
    except (ValueError, binascii.Error):
        return None


class KeyRing:
    """The key that wraps now, and those before it, which only unwrap.

    Args:
        current: the key, or None where none is set: then every use raises PersonalKeyMissing.
        older: keys that were current before.
        timeout: seconds after which a key service that does not answer is given up.
    """

    def __init__(
        self, current: KeyService | None, older: Sequence[KeyService] = (), timeout: float | None = None
    ) -> None:
        self.current = current
        self.timeout = timeout
        self._by_name = {one.name: one for one in (*older, *([current] if current is not None else []))}

    @property
    def name(self) -> str:
        """Of the key that wraps now."""
        return self._present().name

    def knows(self, name: str) -> bool:
        """Can what that key wrapped be unwrapped?"""
        return name in self._by_name

    async def wrap(self, key: bytes, key_id: str) -> bytes:
        """Wrap a subject's key. Raises: PersonalKeyMissing, KeyServiceUnavailable."""
        return await _asked(self._present(), "wrap", key, key_id, self.timeout)

    async def unwrap(self, wrapped: bytes, kek: str, key_id: str) -> bytes:
        """A subject's key. Raises: PersonalKeyMissing, KeyServiceUnavailable."""
        service = self._by_name.get(kek)
        if service is None:
            self._present()
            raise PersonalKeyMissing(
                f"personal data is under the key-encryption key {kek!r}, which is not configured: add it to "
                "AUDIT_TRAIL_PERSONAL_OLD_KEYS"
            )
        return await _asked(service, "unwrap", wrapped, key_id, self.timeout)

    def _present(self) -> KeyService:
        if self.current is None:
            raise PersonalKeyMissing(
                "personal data needs a key-encryption key: set AUDIT_TRAIL_PERSONAL_KEY (or …_FILE), or pass "
                "personal_key=; nothing was stored"
            )
        return self.current


async def _asked(service: KeyService, what: str, value: bytes, key_id: str, timeout: float | None) -> bytes:
    context = {"purpose": "dotmac audit subject key", "key": key_id}
    method = getattr(service, what)
    try:
        if isinstance(service, LocalKey):  # some microseconds
            found = method(value, context)
        else:
            found = await _within(timeout, _answer(method, value, context))
    except Exception as error:
        raise KeyServiceUnavailable(
            f"key-encryption key {service.name!r} could not {what} a subject's key: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, bytes) or not found:
        raise KeyServiceUnavailable(
            f"key-encryption key {service.name!r} gave {type(found).__name__}, not bytes"
        )
    return found


async def _answer(method: Callable[..., Any], value: bytes, context: Mapping[str, str]) -> Any:
    if inspect.iscoroutinefunction(method):
        return await method(value, context)
    found = await asyncio.to_thread(method, value, context)
    return await found if inspect.isawaitable(found) else found


async def _within(timeout: float | None, answer: Awaitable[bytes]) -> bytes:
    """The answer, in time. A service that can't be cancelled is not waited for either."""
    task = asyncio.ensure_future(answer)
    try:
        await asyncio.wait([task], timeout=timeout)
    finally:
        if not task.done():
            task.cancel()
            task.add_done_callback(_look_at)
    if not task.done():
        raise TimeoutError(f"no answer within {timeout:g} s")
    if task.cancelled():
        raise ConnectionAbortedError("the service has cancelled the call")
    return task.result()


def _look_at(task: asyncio.Future[bytes]) -> None:
    if not task.cancelled():
        task.exception()  # nobody waits for it any more
