"""GET /openapi.json, the API described by the models that check its requests, and GET /docs, the same for people.

Format: https://spec.openapis.org/oas/v3.1.1
"""

import json
from html import escape

from pydantic.json_schema import models_json_schema

from mmllm import __version__
from mmllm.serving import inputs
from mmllm.serving.chat_completions import ChatCompletionFields
from mmllm.serving.settings import Settings

MODELS = (inputs.CaptionFields, inputs.QuestionFields, inputs.ChatFields, ChatCompletionFields)
TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
JSON, FORM = "application/json", "multipart/form-data"


def required(**fields: dict) -> dict:
    """The schema of an object that has all `fields`."""
    return {"type": "object", "required": list(fields), "properties": fields}


USAGE = required(prompt_tokens=WHOLE, completion_tokens=WHOLE)
ANSWER = {"finish_reason": {"enum": ["stop", "length"]}, "usage": USAGE, "seed": WHOLE, "model": TEXT, "id": TEXT}
CHOICES = {"type": "array", "items": required(index=WHOLE, message=required(role=TEXT, content=TEXT))}
COMPLETION = required(id=TEXT, object=TEXT, created=WHOLE, model=TEXT, choices=CHOICES, usage=USAGE)
TURN = {"conversation_id": TEXT, "turn": WHOLE, "truncated_turns": WHOLE}
PARAM = {"type": ["string", "null"]}
ERROR = required(error=required(message=TEXT, type=TEXT, param=PARAM, code=TEXT))
STREAM = {"text/event-stream": {"schema": required(data=TEXT)}}  # each event
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "table{border-collapse:collapse}td,th{border:1px solid #8888;padding:.2rem .5rem;text-align:left;vertical-align:top}"
)


def operation(summary: str, answers: dict[str, dict], body: type | None = None, kind: str = JSON) -> dict:
    """What a path does; `answers` are the schemas of a good answer by media type."""
    responses = {
        "200": {"description": "the answer", "content": answers},
        "default": {"$ref": "#/components/responses/Error"},
    }
    operation = {"summary": summary, "responses": responses}
    if body:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        operation["requestBody"] = {"required": True, "content": {kind: {"schema": schema}}}
    return operation


def returns(schema: dict) -> dict[str, dict]:
    return {JSON: {"schema": schema}}


def document(settings: Settings) -> dict:
    """The document, with the limits of this server."""
    _, found = models_json_schema(
        [(model, "validation") for model in MODELS], ref_template="#/components/schemas/{model}"
    )
    schemas = found["$defs"]
    del schemas["JsonValue"]
    for schema in schemas.values():
        for name, field in schema.get("properties", {}).items():
            if field.get("$ref") == "#/components/schemas/JsonValue":  # the schema of anything
                del field["$ref"]
            if name == "max_new_tokens":
                field |= {"maximum": settings.max_new_tokens, "default": min(field["default"], settings.max_new_tokens)}
            elif name in ("prompt", "question", "message"):
                field |= {"minLength": 1, "maxLength": settings.max_message_chars}
    deletion = operation("Remove a conversation", {})
    deletion["responses"] = {"204": {"description": "removed"}, "default": deletion["responses"]["default"]}
    place = inputs.DeleteFields.model_json_schema()["properties"]["conversation_id"]
    deletion["parameters"] = [{"name": "conversation_id", "in": "path", "required": True, "schema": place}]
    caption, answer = required(caption=TEXT, **ANSWER), required(answer=TEXT, **ANSWER)
    response = required(response=TEXT, **TURN, **ANSWER)
    paths = {
        "/caption": {"post": operation("Describe an image", returns(caption) | STREAM, inputs.CaptionFields, FORM)},
        "/question": {"post": operation("Ask about an image", returns(answer) | STREAM, inputs.QuestionFields, FORM)},
        "/chat": {"post": operation("The next turn of a conversation", returns(response) | STREAM, inputs.ChatFields)},
        "/chat/{conversation_id}": {"delete": deletion},
        "/v1/chat/completions": {
            "post": operation("OpenAI's chat completions", returns(COMPLETION) | STREAM, ChatCompletionFields)
        },
        "/v1/models": {
            "get": operation("OpenAI's list of models", returns(required(object=TEXT, data={"type": "array"})))
        },
        "/health": {"get": operation("Whether a question would be answered", returns(required(status=TEXT)))},
        "/livez": {"get": operation("Whether the process answers at all", returns(required(status=TEXT)))},
        "/metrics": {"get": operation("Numbers for Prometheus", {"text/plain": {"schema": TEXT}})},
    }
    paths["/health"]["get"]["responses"]["503"] = {
        "description": "it would not",
        "content": returns(required(status=TEXT)),
    }
    error = {"description": "what was wrong, and the remedy", "content": returns(ERROR)}
    key = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if settings.api_key else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mmllm", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas, "responses": {"Error": error}} | key,
    } | ({"security": [{"key": []}]} if settings.api_key else {})


def page(described: dict) -> str:
    """The document as HTML, which loads nothing from anywhere."""
    rows, schemas = "", described["components"]["schemas"]
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            takes = ", ".join(f"{kind} of {words(body['schema'])}" for kind, body in content.items())
            rows += f"<tr><td>{method.upper()} {escape(path)}<td>{escape(operation['summary'])}<td>{takes}"
    tables = "".join(
        f'<h2 id="{name}">{name}</h2><table><tr><th>field<th>type<th>default<th>'
        + "".join(
            row(field, schema, field in value.get("required", ())) for field, schema in value["properties"].items()
        )
        + "</table>"
        for name, value in schemas.items()
        if "properties" in value
    )
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>mmllm API</title><style>{STYLE}</style>'
    intro = '<h1>mmllm API</h1><p>For programs: <a href="openapi.json">openapi.json</a></p>'
    return f"{head}{intro}<table><tr><th>request<th>what it does<th>takes{rows}</table>{tables}</html>"


def row(name: str, schema: dict, is_required: bool) -> str:
    default = "required" if is_required else json.dumps(schema["default"]) if "default" in schema else ""
    return f"<tr><td>{name}<td>{words(schema)}<td>{escape(default)}<td>{escape(schema.get('description', ''))}"


def words(schema: dict) -> str:
    """A schema in a few words of HTML."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(words(each) for each in schema["anyOf"])
    if "enum" in schema:
        return escape(", ".join(json.dumps(value) for value in schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {words(schema['items'])}"
    limits = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    ranges = [f"{word} {schema[limit]:g}" for limit, word in limits.items() if limit in schema]
    return " ".join([escape(schema.get("format") or str(schema.get("type", "any value"))), *ranges])
