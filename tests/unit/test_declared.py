"""What the package imports, it declares.

Promises: every foreign module that the sources name belongs to a distribution that `pyproject.toml` asks
for, so that no import works only because somebody else's dependency brings it.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
# pydantic hands its own core's types out only there; dotenv is pydantic-settings' reader.
BROUGHT = {"pydantic_core": "pydantic", "dotenv": "pydantic-settings", "starlette": "fastapi"}
LOADERS = {"pytest"}  # the fixtures' module is loaded by pytest itself, never without it


def test_every_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]
    declared = {re.split(r"[^\w.-]", one)[0].lower() for one in wanted}
    distributions = packages_distributions()
    missing = {
        (module, file.name)
        for file in (ROOT / "python").rglob("*.py")
        for module in imported(file)
        if not {BROUGHT.get(module, name).lower() for name in distributions.get(module, [module])} & declared
    }
    assert not missing


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("_extra", "import_module"):
            names |= {one.value for one in node.args if isinstance(one, ast.Constant)}
    top = {name.partition(".")[0] for name in names}
    return top - sys.stdlib_module_names - LOADERS - {"dotmac"}
