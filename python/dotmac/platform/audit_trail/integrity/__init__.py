"""Integrity of the audit trail: logs of segments, signed checkpoints, proofs, verification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dotmac.platform._lazy import lazily

if TYPE_CHECKING:
    from dotmac.platform.audit_trail.integrity.keys import SigningKey
    from dotmac.platform.audit_trail.integrity.notes import Checkpoint, open_note, verifier_key
    from dotmac.platform.audit_trail.integrity.proof import CheckedProof, check_proof
    from dotmac.platform.audit_trail.integrity.report import (
        Finding,
        FindingKind,
        IntegrityReport,
        VerifyProgress,
    )

_HOMES = {
    "CheckedProof": "proof",
    "Checkpoint": "notes",
    "Finding": "report",
    "FindingKind": "report",
    "IntegrityReport": "report",
    "SigningKey": "keys",
    "VerifyProgress": "report",
    "check_proof": "proof",
    "open_note": "notes",
    "verifier_key": "notes",
}

__all__ = [
    "CheckedProof",
    "Checkpoint",
    "Finding",
    "FindingKind",
    "IntegrityReport",
    "SigningKey",
    "VerifyProgress",
    "check_proof",
    "open_note",
    "verifier_key",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
