"""The package as it is installed.

Promises: importing it loads nothing heavy; names come when they are asked for, unknown ones are an
AttributeError; the wheel installs into an empty environment, without the sources at hand, and works there:
locks, migrations, time zones where the machine has none; `make` sets up what is missing, and nothing twice.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dotmac.platform

ROOT = Path(__file__).parents[2]
HEAVY = (
    "asyncpg",
    "redis",
    "pydantic",
    "structlog",
    "sqlalchemy",
    "opentelemetry",
    "httpx",
    "dotmac.platform._native",
)


def test_importing_loads_nothing_heavy() -> None:
    code = f"""
import sys
import dotmac.platform
dir(dotmac.platform)
loaded = [name for name in {HEAVY} if name in sys.modules]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_settings_are_cheap_leaves() -> None:
    code = f"""
import sys
import dotmac.platform.distributed_locks.config, dotmac.platform.service_registry.config
import dotmac.platform.audit_trail.config, dotmac.platform.auth.config
loaded = [name for name in {HEAVY} if name in sys.modules and name != "pydantic"]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", dotmac.platform.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(dotmac.platform, name) is not None


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        dotmac.platform.no_such_name  # noqa: B018 - reading it is the test


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_works_in_an_empty_environment(tmp_path: Path, postgres_database: str) -> None:
    maturin = Path(sys.executable).parent / "maturin"
    build = [
        maturin,
        "build",
        "--quiet",
        "--release",
        "--interpreter",
        sys.executable,
        "--out",
        tmp_path / "dist",
    ]
    subprocess.run(build, cwd=ROOT, check=True, timeout=900)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert "-abi3-" in wheel.name
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=120)
    python = tmp_path / "venv" / "bin" / "python"
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        f"{wheel}[embedded,cli]",
    ]
    subprocess.run(install, check=True, timeout=600)
    code = """
import asyncio, zoneinfo, dotmac.platform
from dotmac.platform import DistributedLockManager
assert "site-packages" in dotmac.platform.__file__, dotmac.platform.__file__
from dotmac.platform.connection.embedded import EmbeddedValkey

async def main():
    with EmbeddedValkey() as server:
        async with DistributedLockManager(redis_url=server.url) as locks:
            async with locks.acquire_lock("packaged", timeout=5.0) as lock:
                assert lock.fencing_token > 0
    zoneinfo.ZoneInfo("Europe/Berlin")
    print("works")

asyncio.run(main())
"""
    # As in a container without /usr/share/zoneinfo.
    done = run_in(tmp_path, python, "-c", code, PYTHONTZPATH="")
    assert (done.returncode, done.stdout) == (0, "works\n"), done.stderr
    command = tmp_path / "venv" / "bin" / "dotmac"
    assert run_in(tmp_path, command, "--version").stdout.strip() == dotmac.platform.__version__
    for arguments in (("db", "upgrade"), ("db", "status")):
        done = run_in(tmp_path, command, *arguments, DATABASE_URL=postgres_database)
        assert done.returncode == 0, done.stdout + done.stderr


def run_in(place: Path, program: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments],
        cwd=place,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """As much of a clone as `make` looks at, everything made already."""
    (tmp_path / "rust").mkdir()
    for name in ("Makefile", "pyproject.toml", "Cargo.toml", "Cargo.lock"):
        shutil.copy(ROOT / name, tmp_path)
    for target in ("venv", "tools", "built"):
        stamp = tmp_path / ".venv" / ".make" / target
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    return tmp_path


def make_in(clone: Path, *arguments: str) -> str:
    # Not what a make that runs these tests has left in the environment for its children.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=clone, env=env, capture_output=True, text=True, check=True, timeout=60
    ).stdout


def planned(clone: Path, target: str) -> str:
    return make_in(clone, "--dry-run", target)


def test_make_sets_up_what_is_missing_and_nothing_twice(clone: Path) -> None:
    assert "Nothing to be done" in planned(clone, "build")
    assert "pip" not in planned(clone, "test")
    shutil.rmtree(clone / ".venv")
    again = planned(clone, "build")
    assert "-m venv .venv" in again
    assert "maturin develop" in again


def test_cargo_is_given_the_environments_python(clone: Path) -> None:
    (clone / "show.mk").write_text("include Makefile\nshow:\n\t@echo $$PYO3_PYTHON\n")
    shown = make_in(clone, "-f", "show.mk", "show")
    assert shown.strip() == str(clone / ".venv" / "bin" / "python")
