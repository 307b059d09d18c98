"""Routes for operators of the server: GET /health, /ready and /metrics.

/health   200 while the process can serve; 503 when an engine has failed and only a restart helps.
/ready    200 when requests should be sent here; 503 with the reason while the default model is not loaded or
          the server is stopping.
/metrics  Prometheus' text format (telemetry.py, docs/guide/serving.md).
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from chatwright.serve.operation.lifecycle import Lifecycle
from chatwright.serve.operation.telemetry import Telemetry
from chatwright.serve.pool import ModelPool


def routes(pool: ModelPool, lifecycle: Lifecycle, telemetry: Telemetry, *, names: bool) -> APIRouter:
    """The routes. `names`: whether /health shows the models' names and the load, and /ready all reasons."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> JSONResponse:
        told: dict[str, Any] = {"models": pool.names, "running": pool.running} if names else {}
        if dead := pool.dead:
            reason = {"reason": f"an engine has ended ({', '.join(dead)})"} if names else {}
            return JSONResponse({"status": "failed", **told, **reason}, status_code=503)
        return JSONResponse({"status": "ok", **told})

    @router.get("/ready")
    async def ready() -> JSONResponse:
        problem = "the server is stopping" if lifecycle.draining else pool.unready
        if not problem:
            return JSONResponse({"status": "ready"})
        if not names and not lifecycle.draining:
            problem = "the default model is not loaded"
        return JSONResponse({"status": "not ready", "reason": problem}, status_code=503)

    @router.get("/metrics", include_in_schema=False)
    async def metrics(request: Request) -> Response:
        body, kind = telemetry.page(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": kind})

    return router
