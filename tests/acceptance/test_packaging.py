"""The package as it is installed.

Promises: importing it loads nothing heavy; names come when they are asked for, unknown ones are an
AttributeError; the wheel installs into an empty environment, without the sources at hand, and works there.
"""

from __future__ import annotations

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
def test_the_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
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
import asyncio, dotmac.platform
from dotmac.platform import DistributedLockManager
assert "site-packages" in dotmac.platform.__file__, dotmac.platform.__file__
from dotmac.platform.connection.embedded import EmbeddedValkey

async def main():
    with EmbeddedValkey() as server:
        async with DistributedLockManager(redis_url=server.url) as locks:
            async with locks.acquire_lock("packaged", timeout=5.0) as lock:
                assert lock.fencing_token > 0
    print("works")

asyncio.run(main())
"""
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "works\n"), done.stderr
    helped = subprocess.run(
        [tmp_path / "venv" / "bin" / "dotmac", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert helped.stdout.strip() == dotmac.platform.__version__
