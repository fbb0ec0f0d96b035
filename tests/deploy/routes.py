"""The GET routes of the real application, from its own OpenAPI document."""

from __future__ import annotations

from service.api.app import create_app
from service.settings import Settings


def get_routes() -> set[str]:
    app = create_app(Settings(redis_url="redis://127.0.0.1:1"))
    return {path for path, methods in app.openapi()["paths"].items() if "get" in methods}
