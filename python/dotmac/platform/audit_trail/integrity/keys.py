"""The key that signs checkpoints, and the keys that are trusted when checkpoints are checked.

The private key comes from the environment, a file, or stays where it is (a KMS) behind a callable; it is
never stored, logged or shown.
"""

from __future__ import annotations

import base64
import binascii
import inspect
from typing import TYPE_CHECKING, Any

from dotmac.platform.errors import ConfigurationError, InvalidArgument, MissingExtra

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from dotmac.platform.audit_trail.config import AuditTrailConfig

    Sign = Callable[[bytes], bytes | Awaitable[bytes]]

__all__ = ["SigningKey", "new_key_pem", "public_key", "public_keys", "signing_key"]

_RAW = 32
_FORMS = (
    "give a PEM private key, or base64 of the 32 secret bytes or of PKCS #8 DER (`openssl genpkey "
    "-algorithm ed25519`)"
)
_PUBLIC_FORMS = "give base64 of the 32 bytes, a PEM public key, or a verifier key `<name>+<id>+<key>`"


class SigningKey:
    """An Ed25519 key pair whose private half only ever signs.

    Args:
        public_key: 32 bytes.
        sign: makes the 64 bytes of the signature (RFC 8032, Ed25519 without prehash) of the bytes it gets;
            may be async. A KMS's client goes here.

    Raises: InvalidArgument: the public key has another length.
    """

    def __init__(self, public_key: bytes, sign: Sign) -> None:
        if not isinstance(public_key, bytes) or len(public_key) != _RAW:
            raise InvalidArgument("public_key", public_key, "give the 32 bytes of an Ed25519 public key")
        self.public_key = public_key
        self._sign = sign

    async def sign(self, message: bytes) -> bytes:
        """The signature, checked, so that a KMS with another key does not go unnoticed.

        Raises: ConfigurationError: what was made is no signature of the message by this key.
        """
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        made = self._sign(message)
        signature = await made if inspect.isawaitable(made) else made
        try:
            # What is no bytes is no signature; its length is the library's business.
            signature = signature if isinstance(signature, bytes) else b""
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(signature, message)
        except InvalidSignature:
            raise ConfigurationError(
                f"the signing key's callable made no Ed25519 signature that holds under {self}"
            ) from None
        return signature

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key that lives in memory alone, for trials."""
        return cls._of(_ed25519().Ed25519PrivateKey.generate())

    @classmethod
    def parse(cls, text: str | bytes, *, name: str = "signing_key") -> SigningKey:
        """Read a private key in PEM or base64; `name` is what an error calls it.

        Raises: ConfigurationError: it is none; the text never shows it.
        """
        private = _private(text.encode() if isinstance(text, str) else text)
        if private is None:
            raise ConfigurationError(f"{name}: not an Ed25519 private key; {_FORMS}", [(name, "***", _FORMS)])
        return cls._of(private)

    @classmethod
    def _of(cls, private: Ed25519PrivateKey) -> SigningKey:
        return cls(private.public_key().public_bytes_raw(), private.sign)

    def __repr__(self) -> str:
        return f"SigningKey(public_key={base64.b64encode(self.public_key).decode()})"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a signing key is not pickled: give each process its own")


def signing_key(given: SigningKey | str | bytes | None, section: AuditTrailConfig) -> SigningKey | None:
    """The key to sign with: the argument, else the configuration's, else None.

    Raises: ConfigurationError: it is no key.
    """
    if isinstance(given, SigningKey):
        return given
    if given is not None:
        return SigningKey.parse(given)
    if section.signing_key is not None:
        return SigningKey.parse(section.signing_key.get_secret_value(), name="AUDIT_TRAIL_SIGNING_KEY")
    return None


def new_key_pem() -> bytes:
    """A new private key in PEM (PKCS #8)."""
    private = _ed25519().Ed25519PrivateKey.generate()

    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def public_key(text: str | bytes, *, name: str = "public_keys") -> bytes:
    """The 32 bytes of a public key in any of its forms.

    Raises: InvalidArgument: it is none.
    """
    if isinstance(text, bytes) and len(text) == _RAW:
        return text
    data = text.encode() if isinstance(text, str) else text
    found = _public(data.strip())
    if found is None:
        raise InvalidArgument(name, data[:200].decode("ascii", "replace"), _PUBLIC_FORMS)
    return found


def public_keys(section: AuditTrailConfig) -> tuple[bytes, ...]:
    """The keys that `AUDIT_TRAIL_PUBLIC_KEYS` lists."""
    texts = (section.public_keys or "").replace(",", " ").split()
    return tuple(public_key(text, name="AUDIT_TRAIL_PUBLIC_KEYS") for text in texts)


def _public(data: bytes) -> bytes | None:
    if data.startswith(b"-----BEGIN"):
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        try:
            loaded = load_pem_public_key(data)
        except ValueError:
            return None
        return loaded.public_bytes_raw() if isinstance(loaded, _ed25519().Ed25519PublicKey) else None
    # A verifier key ends in "+<base64>", whose alphabet has "+" too: its first byte is the type, 0x01.
    for text, head in ((data, b""), (data.split(b"+", 2)[-1], b"\x01")):
        raw = _base64(text)
        if raw is not None and len(raw) == len(head) + _RAW and raw.startswith(head):
            return raw[len(head) :]
    return None


def _private(data: bytes) -> Ed25519PrivateKey | None:
    _ed25519()  # tells how to install it, where it is missing

    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_der_private_key, load_pem_private_key

    data = data.strip().replace(b"\\n", b"\n")  # as one line of an environment file holds it
    try:
        if data.startswith(b"-----BEGIN"):
            loaded = load_pem_private_key(data, password=None)
            return loaded if isinstance(loaded, Ed25519PrivateKey) else None
        raw = _base64(data)
        if raw is None:
            return None
        if len(raw) == _RAW:
            return Ed25519PrivateKey.from_private_bytes(raw)
        loaded = load_der_private_key(raw, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    return loaded if isinstance(loaded, Ed25519PrivateKey) else None


def _base64(data: bytes) -> bytes | None:
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingExtra(
            "checkpoints need cryptography: pip install 'dotmac-platform[integrity]'"
        ) from error
    return ed25519
