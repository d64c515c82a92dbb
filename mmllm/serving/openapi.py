"""GET /openapi.json, the API described by the models that check its requests, and GET /docs, the same for people.

Format: https://spec.openapis.org/oas/v3.1.1
"""

import json
from html import escape

from pydantic.json_schema import models_json_schema
from starlette.responses import HTMLResponse

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
COMPLETION = {"id": TEXT, "object": TEXT, "created": WHOLE, "model": TEXT, "choices": CHOICES, "usage": USAGE}
TURN = {"conversation_id": TEXT, "turn": WHOLE, "truncated_turns": WHOLE}
ERROR = required(message=TEXT, type=TEXT, param={"type": ["string", "null"]}, code=TEXT)
STREAM = {"text/event-stream": {"schema": required(data=TEXT)}}  # each event
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "table{border-collapse:collapse}td,th{border:1px solid #8888;padding:.2rem .5rem;text-align:left;vertical-align:top}"
)


def operation(summary: str, answer: dict, body: type | None = None, kind: str = JSON, status: str = "200") -> dict:
    """What a path does; `answer` has the schemas of a good one by media type."""
    good = {"description": summary, "content": answer}
    operation = {"summary": summary, "responses": {status: good, "default": {"$ref": "#/components/responses/Error"}}}
    if body:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        operation["requestBody"] = {"required": True, "content": {kind: {"schema": schema}}}
    return operation


def returns(**fields: dict) -> dict[str, dict]:
    return {JSON: {"schema": required(**fields)}}


def request_schemas(settings: Settings) -> dict[str, dict]:
    """The schemas of all request bodies, with the limits of this server."""
    models = [(model, "validation") for model in MODELS]
    schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")[1]["$defs"]
    del schemas["JsonValue"]
    for schema in schemas.values():
        for name, field in schema["properties"].items():
            if field.get("$ref") == "#/components/schemas/JsonValue":  # the schema of anything
                del field["$ref"]
            elif name == "max_new_tokens":
                field |= {"maximum": settings.max_new_tokens, "default": min(field["default"], settings.max_new_tokens)}
            elif name in ("prompt", "question", "message"):
                field |= {"minLength": 1, "maxLength": settings.max_message_chars}
    return schemas


def document(settings: Settings) -> dict:
    place = inputs.DeleteFields.model_json_schema()["properties"]["conversation_id"]
    named = {"parameters": [{"name": "conversation_id", "in": "path", "required": True, "schema": place}]}
    health = operation("Whether a question would be answered", returns(status=TEXT))
    health["responses"]["503"] = health["responses"]["200"]
    caption = operation("Describe an image", returns(caption=TEXT, **ANSWER) | STREAM, inputs.CaptionFields, FORM)
    question = operation("Ask about an image", returns(answer=TEXT, **ANSWER) | STREAM, inputs.QuestionFields, FORM)
    turn = returns(response=TEXT, **TURN, **ANSWER) | STREAM
    paths = {
        "/caption": {"post": caption},
        "/question": {"post": question},
        "/chat": {"post": operation("The next turn of a conversation", turn, inputs.ChatFields)},
        "/chat/{conversation_id}": {"delete": operation("Remove a conversation", {}, status="204") | named},
        "/v1/chat/completions": {
            "post": operation("OpenAI's chat completions", returns(**COMPLETION) | STREAM, ChatCompletionFields)
        },
        "/v1/models": {"get": operation("OpenAI's list of models", returns(object=TEXT, data={"type": "array"}))},
        "/health": {"get": health},
        "/livez": {"get": operation("Whether the process answers at all", returns(status=TEXT))},
        "/metrics": {"get": operation("Numbers for Prometheus", {"text/plain": {"schema": TEXT}})},
    }
    error = {"description": "what was wrong, and the remedy", "content": returns(error=ERROR)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mmllm", "version": __version__},
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": request_schemas(settings),
            "responses": {"Error": error},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "where MMLLM_API_KEY is set"}
            },
        },
    }


def page(described: dict) -> HTMLResponse:
    """The document as a page, which loads nothing from anywhere."""
    rows, schemas = "", described["components"]["schemas"]
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            takes = ", ".join(f"{kind} of {words(body['schema'])}" for kind, body in content.items())
            rows += f"<tr><td>{method.upper()} {escape(path)}<td>{escape(operation['summary'])}<td>{takes}"
    tables = "".join(
        f'<h2 id="{name}">{name}</h2><table><tr><th>field<th>type<th>default<th>remarks'
        + "".join(
            row(field, schema, field in value.get("required", ())) for field, schema in value["properties"].items()
        )
        + "</table>"
        for name, value in schemas.items()
    )
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>mmllm API</title><style>{STYLE}</style>'
    intro = '<h1>mmllm API</h1><p>For programs: <a href="openapi.json">openapi.json</a></p>'
    html = f"{head}{intro}<table><tr><th>request<th>what it does<th>takes{rows}</table>{tables}</html>"
    return HTMLResponse(html, headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"})


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
    ranges = [f"{word} {schema[limit]}" for limit, word in limits.items() if limit in schema]
    return " ".join([escape(schema.get("format") or str(schema.get("type", "any value"))), *ranges])
