"""The same platform in an application that is still written with `on_event`, which FastAPI deprecates."""

import os
from typing import Annotated, Any

from fastapi import Body, FastAPI

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.core.unified_config import get_config
from dotmac.platform.distributed_locks import DistributedLockManager
from dotmac.platform.service_registry import ServiceRegistry

HOST = os.environ.get("HOST", "127.0.0.1")
PORT = int(os.environ.get("PORT", "8000"))

config = get_config()
registry = ServiceRegistry(redis_url=config.get_redis_url())
audit = AuditAggregator(postgres_url=config.get_database_url(), redis_url=config.get_redis_url())
locks = DistributedLockManager(redis_url=config.get_redis_url())
app = FastAPI(title="Notes")
notes: dict[str, dict[str, Any]] = {}


@app.on_event("startup")
async def startup() -> None:
    """Register; nothing of the platform was opened before."""
    await audit.migrate()
    await registry.register_service(
        name=config.get_service_name(),
        version=config.app_version,
        host=HOST,
        port=PORT,
        health_check_url=f"http://{HOST}:{PORT}/health",
    )
    await registry.start_health_monitoring()


@app.on_event("shutdown")
async def shutdown() -> None:
    """Closing the registry takes out what it registered."""
    await registry.aclose()
    await locks.aclose()
    await audit.aclose()


@app.get("/health")
async def health() -> dict[str, str]:
    """Alive."""
    return {"status": "ok", "service": config.get_service_name()}


@app.put("/notes/{note_id}")
@locks.with_lock("note:{note_id}", timeout=30.0)
async def put_note(note_id: str, data: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
    """Store a note."""
    notes[note_id] = data
    await audit.log_event(
        category="DATA_CHANGE", action="note.update", resource_type="note", resource_id=note_id
    )
    return notes[note_id]


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, host=HOST, port=PORT)
