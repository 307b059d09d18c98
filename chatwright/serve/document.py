"""The OpenAPI document of the server: FastAPI's, corrected where it differs from what the server does."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from chatwright import __version__
from chatwright.serve.pool import ModelPool


def document(app: FastAPI, pool: ModelPool) -> dict[str, Any]:
    """The OpenAPI document. `model` lists the models served; errors have the shape that the server sends."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=__version__, routes=app.routes)
        schemas = made["components"]["schemas"]
        for schema in schemas.values():
            if "model" in schema.get("properties", {}):
                schema["properties"]["model"]["enum"] = pool.names
        for path in made["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # FastAPI's own; ours is 400 (errors.py)
                for parameter in operation.get("parameters", ()):
                    if parameter["name"] == "name":
                        parameter["schema"]["enum"] = pool.names
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        app.openapi_schema = made
    return app.openapi_schema
