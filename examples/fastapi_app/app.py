"""A FastAPI service that registers itself, audits who did what, and keeps updates of one user apart.

Several processes of it share the users in PostgreSQL, stand in the registry and lock each other out.
"""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import asyncpg
from fastapi import Body, Depends, FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.connection.embedded import aresolve_database
from dotmac.platform.connection.urls import postgres_dsn
from dotmac.platform.core.unified_config import get_config
from dotmac.platform.distributed_locks import DistributedLockManager
from dotmac.platform.service_registry import ServiceRegistry

HOST = os.environ.get("HOST", "127.0.0.1")
PORT = int(os.environ.get("PORT", "8000"))
TABLES = """
    CREATE TABLE IF NOT EXISTS users (
        id text PRIMARY KEY, salt bytea NOT NULL, password bytea NOT NULL,
        profile jsonb NOT NULL DEFAULT '{}');
    CREATE TABLE IF NOT EXISTS tokens (digest bytea PRIMARY KEY, user_id text NOT NULL REFERENCES users);
"""

config = get_config()
registry = ServiceRegistry(redis_url=config.get_redis_url())
audit = AuditAggregator(postgres_url=config.get_database_url(), redis_url=config.get_redis_url())
locks = DistributedLockManager(redis_url=config.get_redis_url())


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open, register, serve; then deregister and close, the last opened first."""
    database = postgres_dsn(await aresolve_database(config.get_database_url()))
    async with registry, audit, locks, asyncpg.create_pool(database, min_size=1, max_size=4) as pool:
        app.state.pool = pool
        # Outside of a demonstration `dotmac db upgrade` does this, when a version is rolled out.
        await audit.migrate()
        async with locks.acquire_lock("users:tables"):
            await pool.execute(TABLES)
        instance = await registry.register_service(
            name=config.get_service_name(),
            version=config.app_version,
            host=HOST,
            port=PORT,
            tags=["users"],
            metadata={"pid": os.getpid()},
            health_check_url=f"http://{HOST}:{PORT}/health",
        )
        await registry.start_health_monitoring()
        yield
        await registry.deregister_service(instance)


app = FastAPI(title="Users", lifespan=lifespan)


class Credentials(BaseModel):
    """What one logs in with."""

    username: str
    password: str


def users(request: Request) -> asyncpg.Pool:
    """The database, opened by `lifespan`."""
    pool: asyncpg.Pool = request.app.state.pool
    return pool


Users = Annotated[asyncpg.Pool, Depends(users)]


async def current_user(
    pool: Users, bearer: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]
) -> str:
    """Who is logged in with the token that the request carries."""
    digest = hashlib.sha256(bearer.credentials.encode()).digest()
    user = await pool.fetchval("SELECT user_id FROM tokens WHERE digest = $1", digest)
    if user is None:
        raise HTTPException(401, "this token is not known; POST /login gives one")
    return str(user)


CurrentUser = Annotated[str, Depends(current_user)]


@app.get("/health")
async def health(pool: Users) -> dict[str, Any]:
    """Well if the database answers; the name lets the asker see that nobody else took over the address."""
    await pool.fetchval("SELECT 1")
    return {"status": "ok", "service": config.get_service_name(), "pid": os.getpid()}


@app.post("/users", status_code=201)
async def add_user(credentials: Credentials, pool: Users) -> dict[str, str]:
    """A new user; 409 if the name is taken."""
    salt = secrets.token_bytes(16)
    hashed = await run_in_threadpool(hash_password, credentials.password, salt)
    added = await pool.fetchval(
        "INSERT INTO users VALUES ($1, $2, $3) ON CONFLICT DO NOTHING RETURNING id",
        credentials.username,
        salt,
        hashed,
    )
    if added is None:
        raise HTTPException(409, f"the name {credentials.username!r} is taken")
    await audit.log_event(
        category="DATA_CHANGE", action="user.create", resource_type="user", resource_id=credentials.username
    )
    return {"id": credentials.username}


@app.post("/login")
async def login(credentials: Credentials, request: Request, pool: Users) -> dict[str, str]:
    """A token for the right password; every attempt is audited, with the address that it came from."""
    row = await pool.fetchrow("SELECT salt, password FROM users WHERE id = $1", credentials.username)
    # An unknown user costs the same time as a wrong password.
    salt, expected = (row["salt"], row["password"]) if row else (b"-", b"-")
    given = await run_in_threadpool(hash_password, credentials.password, salt)
    success = hmac.compare_digest(given, expected)
    await audit.log_event(
        category="AUTHENTICATION",
        action="user.login",
        level="INFO" if success else "WARNING",
        outcome="success" if success else "failure",
        user_id=credentials.username,
        ip_address=request.client.host if request.client else None,
        metadata={"user_agent": request.headers.get("user-agent", "")},
    )
    if not success:
        raise HTTPException(401, "user name or password is wrong")
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).digest()
    await pool.execute("INSERT INTO tokens VALUES ($1, $2)", digest, credentials.username)
    return {"token": token}


@app.get("/users/{user_id}")
async def get_user(user_id: str, pool: Users, me: CurrentUser) -> dict[str, Any]:
    """A profile, never one that is half way through a change."""
    await audit.log_event(
        category="DATA_ACCESS",
        action="user.read",
        user_id=me,
        resource_type="user",
        resource_id=user_id,
    )
    async with locks.acquire_lock(f"user:{user_id}"):
        return {"id": user_id, "profile": await read_profile(pool, user_id)}


@app.put("/users/{user_id}")
@locks.with_lock("user:{user_id}", timeout=5.0)
async def update_user(
    user_id: str, data: Annotated[dict[str, Any], Body()], pool: Users, me: CurrentUser
) -> dict[str, Any]:
    """Change some fields of a profile and count the change; nobody else changes it in between.

    A lease of 5 s is kept up for as long as this takes; if the process dies, others wait that long.
    """
    profile = await read_profile(pool, user_id)
    profile |= data | {"changes": profile.get("changes", 0) + 1}
    await pool.execute("UPDATE users SET profile = $2 WHERE id = $1", user_id, json.dumps(profile))
    await audit.log_event(
        category="DATA_CHANGE",
        action="user.update",
        user_id=me,
        resource_type="user",
        resource_id=user_id,
        metadata={"fields": sorted(data)},
    )
    return {"id": user_id, "profile": profile}


async def read_profile(pool: asyncpg.Pool, user_id: str) -> dict[str, Any]:
    """The stored profile; 404 if there is no such user."""
    found = await pool.fetchval("SELECT profile FROM users WHERE id = $1", user_id)
    if found is None:
        raise HTTPException(404, f"there is no user {user_id!r}")
    profile: dict[str, Any] = json.loads(found)
    return profile


def hash_password(password: str, salt: bytes) -> bytes:
    """Slow on purpose: tens of milliseconds."""
    return hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=1)


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, host=HOST, port=PORT)
