"""Checkpoints, keys and proofs, without a database.

Promises: a checkpoint is, byte for byte, the signed note that golang.org/x/mod/sumdb/note makes of it, and a
note of that program's making is accepted (vectors/checkpoint: made by it, not by us); roots, inclusion and
consistency proofs are those of golang.org/x/mod/sumdb/tlog; a note with any changed byte is refused, and so
is one of an unknown key; keys are read in every form, and never shown; a KMS's wrong signature is noticed.
"""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from dotmac.platform import _native
from dotmac.platform.audit_trail.config import AuditTrailConfig
from dotmac.platform.audit_trail.integrity import Checkpoint, SigningKey, open_note, verifier_key
from dotmac.platform.audit_trail.integrity.keys import new_key_pem, public_key, public_keys, signing_key
from dotmac.platform.audit_trail.integrity.notes import log_name, sign_text, tenant_of
from dotmac.platform.core.unified_config import PlatformConfig
from dotmac.platform.errors import ConfigurationError, InvalidArgument, InvalidCheckpoint

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "checkpoint" / "vectors.json").read_text())
NAME = "example.com/audit/tenant%201"
SEED = bytes.fromhex(VECTORS["seed"])
KEY = SigningKey.parse(base64.b64encode(SEED))
LEAVES = [bytes.fromhex(leaf) for leaf in VECTORS["leaves"]]
ROOTS = [bytes.fromhex(root) for root in VECTORS["roots"]]


async def test_a_checkpoint_is_the_note_that_another_program_makes() -> None:
    checkpoint = Checkpoint(log_name("example.com/audit", "tenant 1"), 21, ROOTS[20])
    assert checkpoint.text == VECTORS["text"]
    signature = await KEY.sign(checkpoint.text.encode())
    assert sign_text(checkpoint.text, NAME, KEY.public_key, signature) == VECTORS["note"]
    assert verifier_key(NAME, KEY.public_key) == VECTORS["verifier"]
    assert public_key(VECTORS["verifier"]) == KEY.public_key


def test_another_programs_note_is_accepted_and_others_beside_it_are_ignored() -> None:
    assert open_note(VECTORS["note"], [KEY.public_key]) == (Checkpoint(NAME, 21, ROOTS[20]), KEY.public_key)
    stranger = SigningKey.generate()
    line = f"— witness.example {base64.b64encode(b'1234' + bytes(64)).decode()}\n"
    found = open_note(VECTORS["note"] + line, [stranger.public_key, KEY.public_key])
    assert found == (Checkpoint(NAME, 21, ROOTS[20]), KEY.public_key)
    with pytest.raises(InvalidCheckpoint, match="not signed with a key that is trusted") as caught:
        open_note(VECTORS["note"], [stranger.public_key])
    assert caught.value.reason == "unknown_key"
    with pytest.raises(InvalidCheckpoint):
        open_note(VECTORS["note"], [])


def test_proofs_are_those_of_another_program() -> None:
    whole = b"".join(LEAVES)
    tree = _native.MerkleTree()
    for size, root in enumerate(ROOTS, 1):
        tree.extend(LEAVES[size - 1])
        assert (len(tree), tree.root(), _native.merkle_root(whole[: 32 * size])) == (size, root, root)
    for one in VECTORS["inclusion"]:
        path = [bytes.fromhex(step) for step in one["path"]]
        size, index = one["size"], one["index"]
        assert _native.merkle_inclusion(whole[: 32 * size], index) == path
        assert _native.merkle_root_of_inclusion(LEAVES[index], index, size, path) == ROOTS[size - 1]
        assert (
            _native.merkle_root_of_inclusion(
                LEAVES[index], index, size, [*path, path[0]] if path else [ROOTS[0]]
            )
            is None
        )
    for one in VECTORS["consistency"]:
        path = [bytes.fromhex(step) for step in one["path"]]
        size, old = one["size"], one["index"]
        assert _native.merkle_consistency(whole[: 32 * size], old) == path
        assert _native.merkle_is_consistent(old, ROOTS[old - 1], size, ROOTS[size - 1], path)
        if old < size:
            assert not _native.merkle_is_consistent(old, ROOTS[old - 1], size, ROOTS[0], path)
    with pytest.raises(ValueError, match="no leaf"):
        _native.merkle_inclusion(whole, 21)
    with pytest.raises(ValueError, match="fewer leaves"):
        _native.merkle_consistency(whole, 22)
    with pytest.raises(ValueError, match="32 bytes"):
        tree.extend(b"short")


@given(st.integers(0, len(VECTORS["note"].encode()) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused(place: int, change: int) -> None:
    data = bytearray(VECTORS["note"].encode())
    data[place] ^= change
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    # The bits after a base64's end are the only ones that say nothing.
    try:
        found = open_note(text, [KEY.public_key])
    except InvalidCheckpoint:
        return
    assert found[0].text == VECTORS["text"]
    assert text.split("\n\n")[0] == VECTORS["note"].split("\n\n")[0]


def test_a_note_that_is_no_utf_8_is_refused() -> None:
    """JSON can carry such a text."""
    for place in ("example.com", "— "):
        with pytest.raises(InvalidCheckpoint, match="UTF-8"):
            open_note(VECTORS["note"].replace(place, f"{place}\ud800", 1), [KEY.public_key])


@given(st.text(max_size=300))
def test_arbitrary_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidCheckpoint):
        open_note(text, [KEY.public_key])


@pytest.mark.parametrize(
    "text",
    [
        *("a\n1\n", "a\n01\nAAAA\n", "a\n-1\nAAAA\n", "\n1\nAAAA\n"),
        *("a\n1\nAAAA\n", "a\n1\n!\n", "a\n1\nAAAA", "a\n٣\nAAAA\n"),
    ],
)
def test_malformed_checkpoints_are_refused(text: str) -> None:
    with pytest.raises(InvalidCheckpoint) as caught:
        Checkpoint.parse(text)
    assert caught.value.reason == "malformed"
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.reason) == (str(caught.value), "malformed")


@given(st.text())
def test_the_name_of_a_log_gives_its_tenant_back(tenant: str) -> None:
    try:
        tenant.encode()
    except UnicodeEncodeError:
        return
    name = log_name("example.com/audit", tenant)
    # PostgreSQL's text has no NUL, so no tenant has.
    assert tenant_of("example.com/audit", name) == (None if "\0" in tenant else tenant)
    assert not set(name) & set(" +\n")
    assert tenant_of("example.com/other", name) is None


PRIVATE = Ed25519PrivateKey.from_private_bytes(SEED)
PEM = PRIVATE.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
)
DER = PRIVATE.private_bytes(
    serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
)
PUBLIC_PEM = PRIVATE.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)


@pytest.mark.parametrize(
    "text",
    [PEM, PEM.decode(), PEM.decode().replace("\n", "\\n"), base64.b64encode(DER), base64.b64encode(SEED)],
)
def test_private_keys_are_read_in_every_form(text: str | bytes) -> None:
    assert SigningKey.parse(text).public_key == KEY.public_key
    given = text.decode() if isinstance(text, bytes) else text
    assert signing_key(None, AuditTrailConfig(signing_key=given)).public_key == KEY.public_key


def test_public_keys_are_read_in_every_form() -> None:
    raw = KEY.public_key
    for text in (raw, base64.b64encode(raw), PUBLIC_PEM, verifier_key("x/y", raw)):
        assert public_key(text) == raw
    other = SigningKey.generate().public_key
    listed = f"{base64.b64encode(raw).decode()}, {verifier_key('example.com/a', other)}"
    assert public_keys(AuditTrailConfig(public_keys=listed)) == (raw, other)
    for bad in ("", "x", base64.b64encode(b"short"), "-----BEGIN PUBLIC KEY-----\nxx"):
        with pytest.raises(InvalidArgument, match="public_keys"):
            public_key(bad)


def test_where_a_key_comes_from_and_what_is_wrong_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key.pem"
    file.write_bytes(new_key_pem())
    monkeypatch.setenv("AUDIT_TRAIL_SIGNING_KEY_FILE", str(file))
    assert signing_key(None, PlatformConfig().audit_trail) is not None
    assert signing_key(None, AuditTrailConfig()) is None
    assert signing_key(KEY, AuditTrailConfig(signing_key="anything")) is KEY
    secret = base64.b64encode(b"a secret of the wrong length").decode()
    for bad in (secret, "-----BEGIN PRIVATE KEY-----\nbm8=\n-----END PRIVATE KEY-----", "not base64!"):
        with pytest.raises(ConfigurationError, match="AUDIT_TRAIL_SIGNING_KEY: not an Ed25519") as caught:
            signing_key(None, AuditTrailConfig(signing_key=bad))
        assert bad not in str(caught.value)
        assert bad not in repr(caught.value.problems)


async def test_no_key_is_shown_and_a_wrong_signature_is_noticed() -> None:
    assert repr(KEY) == f"SigningKey(public_key={base64.b64encode(KEY.public_key).decode()})"
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(KEY)

    async def kms(message: bytes) -> bytes:
        return PRIVATE.sign(message)

    assert await SigningKey(KEY.public_key, kms).sign(b"x") == PRIVATE.sign(b"x")
    for wrong in (lambda _: bytes(64), lambda _: b"", lambda _: None):
        with pytest.raises(ConfigurationError, match="no Ed25519 signature"):
            await SigningKey(KEY.public_key, wrong).sign(b"x")
    with pytest.raises(InvalidArgument, match="public_key"):
        SigningKey(b"short", PRIVATE.sign)
