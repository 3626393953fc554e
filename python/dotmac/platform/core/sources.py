"""Where settings come from: the environment, `.env`, files that variables name, a directory of secrets.

Each value keeps its origin, so that errors and `explain` can name it. In order, first match wins:

    NAME in the environment, or the file that NAME_FILE names
    NAME (or NAME_FILE) in `.env` of the current directory, or in the file that DOTMAC_ENV_FILE names
    a file NAME or name in DOTMAC_SECRETS_DIR, by default /run/secrets

An empty value counts as unset, as compose files and CI systems mean it.
"""

from __future__ import annotations

import difflib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING

from dotenv import dotenv_values
from dotenv.parser import parse_stream

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Found", "Problem", "Sources", "nearest"]

Problem = tuple[str, str, str]

_LONGEST_SECRET = 1_000_000
# What Kubernetes sets for a service that happens to be called `service-registry`, and the like.
_KUBERNETES = re.compile(r"_SERVICE_(HOST|PORT\w*)$|_PORT(_\d+_(TCP|UDP|SCTP)\w*)?$")


@dataclass(frozen=True, slots=True)
class Found:
    """A value as text and where it came from."""

    value: str
    origin: str


class Sources:
    """A snapshot of all sources but arguments. `problems` grows while it is read."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self.problems: list[Problem] = []
        given = dict(os.environ if environ is None else environ)
        self._environ = {name: Found(value, f"environment {name}") for name, value in given.items()}
        self._dotenv = self._read_dotenv(
            Path(given.get("DOTMAC_ENV_FILE") or ".env"), bool(given.get("DOTMAC_ENV_FILE"))
        )
        self._secrets = Path(given.get("DOTMAC_SECRETS_DIR") or "/run/secrets")

    def find(self, name: str) -> Found | None:
        """The value of a variable, None if it is unset everywhere."""
        for layer in (self._environ, self._dotenv):
            direct, named = layer.get(name), layer.get(f"{name}_FILE")
            if direct is not None and direct.value and named is not None and named.value:
                self.problems.append((name, "***", f"set either {name} or {name}_FILE, not both"))
            if direct is not None and direct.value:
                return direct
            if named is not None and named.value:
                return self._from_file(
                    f"{name}_FILE", Path(named.value), f"file {named.value} ({named.origin})"
                )
        for candidate in (name, name.lower()):
            file = self._secrets / candidate
            if self._is_secret(file):
                return self._from_file(name, file, f"secret file {file}")
        return None

    def report_unknown(self, prefixes: Iterable[str], known: Iterable[str]) -> None:
        """Note each variable that begins as one of ours and isn't one."""
        names = {*known, *(f"{name}_FILE" for name in known)}
        for name in sorted({*self._environ, *self._dotenv}):
            if name.startswith(tuple(prefixes)) and name not in names and not _KUBERNETES.search(name):
                self.problems.append((name, "***", f"no such setting; {nearest(name, names)}"))

    def _is_secret(self, file: Path) -> bool:
        try:
            return S_ISREG(file.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            # Going on without would take a default where a secret is meant.
            allowed = (
                f"it must name a directory that can be read, or one that doesn't exist ({error.strerror})"
            )
            self.problems.append(("DOTMAC_SECRETS_DIR", str(self._secrets), allowed))
            return False

    def _from_file(self, name: str, file: Path, origin: str) -> Found | None:
        try:
            with file.open("rb") as stream:
                content = stream.read(_LONGEST_SECRET).decode()
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append((name, str(file), f"it must name a readable text file ({error})"))
            return None
        # One newline at the end is the editor's, not the secret's.
        text = content.removesuffix("\n").removesuffix("\r")
        return Found(text, origin) if text else None

    def _read_dotenv(self, file: Path, wanted: bool) -> dict[str, Found]:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            if wanted or not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
                self.problems.append(
                    ("DOTMAC_ENV_FILE", str(file), f"it must name a readable text file ({error})")
                )
            return {}
        lines: dict[str, int] = {}
        for binding in parse_stream(io.StringIO(text)):
            # A binding begins with the empty lines before it.
            before = len(binding.original.string) - len(binding.original.string.lstrip("\n"))
            line = binding.original.line + before
            if binding.error:
                self.problems.append((f"{file}:{line}", "***", "a line is NAME=value, a comment or empty"))
            elif binding.key is not None:
                lines[binding.key] = line
        values = dotenv_values(stream=io.StringIO(text)) if not self.problems else {}
        return {
            name: Found(value, f"{file}:{lines[name]}") for name, value in values.items() if value is not None
        }


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that is most like a given one."""
    choices = sorted(known)
    alike = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f"did you mean {alike[0]}?" if alike else f"known are {', '.join(choices)}"
