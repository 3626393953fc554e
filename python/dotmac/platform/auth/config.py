"""Settings of authentication, read from `AUTH_*`. A leaf: it imports no service."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import SecretStr, model_validator

from dotmac.platform.connection.config import Seconds, Section

__all__ = ["AuthConfig"]

_SHORTEST_KEY = {"HS256": 32, "HS384": 48, "HS512": 64}


class AuthConfig(Section):
    """Settings of authentication.

    Args:
        jwt_secret: key that signs tokens; at least as long as its algorithm's hash (RFC 7518, section 3.2).
        jwt_algorithm: the one algorithm that is used and accepted.
        jwt_issuer: `iss` of tokens; None for the service's name.
        jwt_audience: `aud` of tokens.
        access_token_ttl: seconds for which an access token is valid.
        refresh_token_ttl: seconds for which a refresh token is valid.
    """

    jwt_secret: SecretStr | None = None
    jwt_algorithm: Literal["HS256", "HS384", "HS512"] = "HS256"
    jwt_issuer: str | None = None
    jwt_audience: str | None = None
    access_token_ttl: Seconds = 900.0
    refresh_token_ttl: Seconds = 1_209_600.0

    @model_validator(mode="after")
    def _key_is_long_enough(self) -> Self:
        least = _SHORTEST_KEY[self.jwt_algorithm]
        if self.jwt_secret is not None and len(self.jwt_secret.get_secret_value().encode()) < least:
            raise ValueError(f"jwt_secret must have at least {least} bytes for {self.jwt_algorithm}")
        return self
