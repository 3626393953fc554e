"""The error tree.

Promises: the tree drawn in the module is the tree of the classes, builtin bases included; every error has a
code of its own and a page under docs/errors that states its name, code and retryability; no page is left
over; errors survive pickling, as multiprocessing and task queues need.
"""

from __future__ import annotations

import inspect
import pickle
import re
from pathlib import Path

import pytest

from dotmac.platform import errors
from dotmac.platform.errors import DotmacError

PAGES = Path(__file__).parents[2] / "docs" / "errors"
ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, DotmacError)]


def drawn() -> dict[str, tuple[str | None, str | None]]:
    """Name → (parent, builtin base) as the module's docstring draws it."""
    found: dict[str, tuple[str | None, str | None]] = {}
    above: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        match = re.match(r"    (?P<indent>[│├└─ ]*)(?P<name>[A-Z]\w+)(?: \((?P<builtin>\w+)\))?", line)
        if match is None:
            continue
        depth = len(match["indent"])
        above = [one for one in above if one[0] < depth]
        found[match["name"]] = (above[-1][1] if above else None, match["builtin"])
        above.append((depth, match["name"]))
    return found


def test_the_drawn_tree_is_the_tree_of_the_classes() -> None:
    real = {}
    for kind in ALL:
        ours = [base.__name__ for base in kind.__bases__ if issubclass(base, DotmacError)]
        builtin = [base.__name__ for base in kind.__bases__ if not issubclass(base, DotmacError)]
        root = kind is DotmacError
        real[kind.__name__] = (ours[0] if ours else None, None if root or not builtin else builtin[0])
        assert root or len(ours) == 1
    assert drawn() == real
    assert {kind.__name__ for kind in ALL} == set(errors.__all__)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_has_its_page(kind: type[DotmacError]) -> None:
    page = (PAGES / f"{kind.code}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# `{kind.code}`: {kind.__name__}\n")
    assert f"- Retryable: {'yes' if kind.retryable else 'no'}\n" in page
    assert "## What to do" in page


def test_codes_are_unique_and_no_page_is_left_over() -> None:
    codes = [kind.code for kind in ALL]
    assert len(codes) == len(set(codes))
    assert {page.stem for page in PAGES.glob("*.md")} == set(codes)


def test_errors_survive_pickling() -> None:
    for kind in ALL:
        error = kind("f", "value", "allowed") if kind is errors.InvalidArgument else kind("text")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (kind, str(error))
    for error in (
        errors.ConfigurationError("text", [("A", "b", "c")]),
        errors.DeadlockDetected("text", ["a", "b"]),
        errors.InvalidArgument("f", "v", "a"),
    ):
        assert vars(pickle.loads(pickle.dumps(error))) == vars(error)


def test_long_values_are_shortened() -> None:
    assert len(str(errors.InvalidArgument("name", "x" * 10_000_000, "shorter"))) < 300
