"""The relayed paths on the OpenAPI page, made from the table: their bodies are the workers' to define."""

from typing import Any

from fastapi import FastAPI

from gateway.endpoints import ENDPOINTS, OTHER, Endpoint

Json = dict[str, Any]

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type"]}},
}


def document(app: FastAPI) -> None:
    """Add the relayed paths to the page; made when it is first asked for."""
    own = app.openapi

    def openapi() -> Json:
        if app.openapi_schema is None:
            own()["paths"].update(relayed_paths())
        return own()

    app.openapi = openapi  # type: ignore[method-assign]


def relayed_paths() -> Json:
    """OpenAPI `paths` of everything that is relayed."""
    paths = {path: {"post": _operation(endpoint)} for path, endpoint in ENDPOINTS.items()}
    rest = {"name": "rest", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/{rest}"] = {"post": _operation(OTHER) | {"parameters": [rest]}}
    return paths


def _operation(endpoint: Endpoint) -> Json:
    media = "application/json" if endpoint.body == "json" else "multipart/form-data"
    properties = {"model": {"type": "string"}} | {
        name: _schema(kind) for name, kind in endpoint.fields.items()
    }
    body = {"type": "object", "properties": properties, "additionalProperties": True}
    answers: Json = {"application/json": {"schema": {}}}
    if endpoint.streams:
        answers["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "tags": ["relayed"],
        "summary": f"Relayed to a worker: {endpoint.path}",
        "operationId": "relay" + endpoint.path.replace("/", "_").replace("*", "other"),
        "requestBody": {"required": True, "content": {media: {"schema": body}}},
        "responses": {
            "200": {"description": "The worker's answer.", "content": answers},
            "default": {
                "description": "A refusal, the gateway's or the worker's.",
                "content": {"application/json": {"schema": _ERROR}},
            },
        },
    }


def _schema(kind: str) -> Json:
    if kind == "any":
        return {}
    return {"type": "string", "format": "binary"} if kind == "file" else {"type": kind}
