"""What ``/openapi.json`` tells of the endpoints that FastAPI does not know by itself: bodies and answers."""

from collections.abc import Iterator
from typing import Any

from osler.config.schema import json_schema
from osler.serve.config import ChatRequest, CompletionRequest, OptionsRequest

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": meaning}
    for status, meaning in (
        (400, "The request is wrong; the error names the parameter."),
        (401, "The key is missing or wrong."),
        (403, "The server answers to localhost alone."),
        (404, "There is no such model."),
        (408, "The body did not arrive in time."),
        (413, "The body is too large."),
        (415, "The body is not JSON."),
        (429, "Too many requests wait."),
        (503, "The server is about to stop."),
        (504, "The answer took too long."),
    )
}
RESPONSES[200] = {"description": "The answer, whole or as a stream.", "content": {"text/event-stream": {}}}


def body_of(kind: type) -> dict[str, Any]:
    """Return the description of a body, for ``openapi_extra`` of a route."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _schemas() -> Iterator[tuple[str, Any]]:
    for kind in (ChatRequest, CompletionRequest, OptionsRequest):
        schema = json_schema(kind)
        yield from schema.pop("$defs", {}).items()
        yield kind.__name__, schema


def with_bodies(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a description of the endpoints with what ``body_of`` refers to."""
    schema.setdefault("components", {}).setdefault("schemas", {}).update(_schemas())
    return schema
