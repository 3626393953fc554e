"""Which endpoint, or dependency, FastAPI is building the parameters of.

FastAPI asks a dependency for its signature without a word about who depends on it. To fill a template from
the endpoint's own parameters, with the types declared there, the dependency has to know: so it looks up the
stack for the function that FastAPI is at work on. Nothing but this file depends on how FastAPI does that.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import get_typed_signature

if TYPE_CHECKING:
    import inspect
    from collections.abc import Callable
    from types import FrameType

__all__ = ["Asker", "find_asker"]


@dataclass(frozen=True)
class Asker:
    """The function that depends on another one.

    Args:
        name: for messages.
        signature: its parameters, with annotations resolved.
        in_path: names in the path of the route.
    """

    name: str
    signature: inspect.Signature
    in_path: tuple[str, ...]


def find_asker(dependency: Callable[..., Any]) -> Asker | None:
    """Who asks for `dependency`; None where FastAPI is not at work, or no longer works as known here."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - see above
    path: str | None = None
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] == "fastapi":
            known = frame.f_locals
            if path is None and isinstance(known.get("path"), str):
                path = known["path"]
            # `get_dependant` builds what it calls `call`, the route adds the dependencies of its `endpoint`,
            # and `solve_dependencies` has those of its `dependant` built anew where there are overrides.
            dependant = known.get("dependant")
            of_dependant = dependant.call if isinstance(dependant, Dependant) else None
            for function in (known.get("call"), of_dependant, known.get("endpoint")):
                if callable(function) and function != dependency:
                    name = str(getattr(function, "__qualname__", None) or repr(function))
                    in_path = tuple(re.findall(r"{(\w+)(?::\w+)?}", path or ""))
                    return Asker(name, get_typed_signature(function), in_path)
        frame = frame.f_back
    return None
