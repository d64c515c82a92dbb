"""The endpoints of this server's own API, and the application with these and those of OpenAI's."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from uuid import uuid4

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmllm import __version__
from mmllm.data.chat import user
from mmllm.inference.pipeline import MultimodalInferencePipeline
from mmllm.inference.request import Generated, Prompt
from mmllm.serving import http, inputs, openapi
from mmllm.serving.chat_completions import ChatCompletions
from mmllm.serving.conversations import Conversation
from mmllm.serving.page import page
from mmllm.serving.service import Put, Service
from mmllm.serving.settings import Settings


class Endpoints:
    def __init__(self, service: Service):
        self.service, self.settings = service, service.settings

    async def caption(self, request: Request) -> Response:
        fields = await self.service.read(request, inputs.CaptionFields)
        return await self.answer_about_image(request, fields, fields.prompt, "caption")

    async def question(self, request: Request) -> Response:
        fields = await self.service.read(request, inputs.QuestionFields)
        return await self.answer_about_image(request, fields, fields.question, "answer")

    async def answer_about_image(
        self, request: Request, fields: inputs.ImageFields, text: str, result: str
    ) -> Response:
        """One question about one image; the answer has the name `result`."""

        async def work(put: Put | None) -> dict:
            image = await self.service.crop(fields.image, "image")
            prompt = await self.service.prompt([user(text, images=1)], [image], fields.max_new_tokens)
            answer = await self.service.generate(request, prompt, fields.config, deltas(put))
            return {result: answer.text} | self.metadata(request, answer, fields)

        return await self.service.respond(request, work, is_stream=fields.stream)

    async def chat(self, request: Request) -> Response:
        """The next turn of a conversation, which is stored only when it was answered."""
        fields = await self.service.read(request, inputs.ChatFields)
        name = fields.conversation_id or uuid4().hex

        service, conversations = self.service, self.service.conversations

        async def work(put: Put | None) -> dict:
            async with conversations.lock(name):
                conversation = Conversation() if fields.reset else conversations.get(name)
                if fields.image_base64 is not None:
                    conversation = conversation.with_image(await service.crop(fields.image_base64, "image_base64"))
                fit = partial(self.fit, conversation, fields.message, fields.max_new_tokens)
                conversation, prompt = await service.in_text_thread(fit)
                answer = await service.generate(request, prompt, fields.config, deltas(put))
                conversation = replace(conversation, turns=(*conversation.turns, (fields.message, answer.text)))
                conversations.put(name, conversation)
            turn = conversation.dropped + len(conversation.turns)
            place = {"conversation_id": name, "turn": turn, "truncated_turns": conversation.dropped}
            return {"response": answer.text} | place | self.metadata(request, answer, fields)

        return await service.respond(request, work, is_stream=fields.stream)

    def fit(self, conversation: Conversation, question: str, new_tokens: int) -> tuple[Conversation, Prompt]:
        """The conversation without its oldest turns if they leave no room for `new_tokens`, and its prompt."""
        while True:
            images = [conversation.image] if conversation.image else []
            prompt = self.service.worker.pipeline.prompt(conversation.messages(question), images)
            if len(prompt.ids) + new_tokens <= self.service.context or not conversation.turns:
                return conversation, self.service.check_fits(prompt, new_tokens)
            conversation = conversation.without_oldest_turn()

    def metadata(self, request: Request, answer: Generated, fields: inputs.GenerationFields) -> dict[str, object]:
        """What every answer has besides its text."""
        usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": len(answer.ids)}
        request.scope["log"] |= usage
        return {
            "finish_reason": answer.finish_reason,
            "usage": usage,
            "seed": fields.seed,
            "model": self.settings.model_name,
            "id": request.scope["request_id"],
        }

    async def delete_conversation(self, request: Request) -> Response:
        http.check_key(request, self.settings.api_key)
        name = inputs.validate(inputs.DeleteFields, request.path_params, self.settings, is_form=False).conversation_id
        async with self.service.conversations.lock(name):
            self.service.conversations.delete(name)
        return Response(status_code=204)

    async def health(self, request: Request) -> Response:
        """200 when a question would be answered, else 503 and the reason."""
        service, worker = self.service, self.service.worker
        engine = worker.engine
        body = {
            "status": service.status,
            "model": self.settings.model_name,
            "version": __version__,
            "device": str(engine.model.device) if engine else None,
            "slots": {"total": worker.slots, "busy": engine.busy if engine else 0},
            "queue": {"waiting": len(engine.waiting) if engine else 0, "limit": service.queue},
            "uptime_s": round(time.monotonic() - service.started_at, 1),
        }
        return JSONResponse(body, 200 if body["status"] == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        http.check_key(request, self.settings.api_key)
        self.service.metrics.engine = self.service.worker.engine
        return Response(generate_latest(self.service.metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


def deltas(put: Put | None) -> Callable[[str], None] | None:
    """Receives the pieces of an answer and sends each as an event; None without a stream."""
    return put and (lambda piece: put({"delta": piece}))


def create_app(load: Callable[[], MultimodalInferencePipeline], settings: Settings) -> Starlette:
    """The ASGI application; `load` is called in the worker's thread once the application starts."""
    service = Service(load, settings)
    middleware = [Middleware(http.RequestLog, service.metrics.count_request)]
    if settings.origins:
        allowed = {"allow_methods": ["GET", "POST", "DELETE"], "allow_headers": ["Authorization", "Content-Type"]}
        exposed = ["X-Request-ID", "Retry-After"]
        middleware.append(Middleware(CORSMiddleware, settings.origins, expose_headers=exposed, **allowed))
    own, chat_completions = Endpoints(service), ChatCompletions(service)
    described = openapi.document(settings)
    app = Starlette(
        routes=[
            Route("/caption", own.caption, methods=["POST"]),
            Route("/question", own.question, methods=["POST"]),
            Route("/chat", own.chat, methods=["POST"]),
            Route("/chat/{conversation_id}", own.delete_conversation, methods=["DELETE"]),
            Route("/v1/chat/completions", chat_completions.create, methods=["POST"]),
            Route("/v1/models", chat_completions.models, methods=["GET"]),
            Route("/health", own.health, methods=["GET"]),
            Route("/openapi.json", JSONResponse(described), methods=["GET"]),
            Route("/docs", openapi.page(described), methods=["GET"]),
            Route("/livez", JSONResponse({"status": "alive"}), methods=["GET"]),  # as long as the event loop turns
            Route("/metrics", own.metrics, methods=["GET"]),
            Route("/", page(), methods=["GET"]),
        ],
        middleware=middleware,
        exception_handlers=http.EXCEPTION_HANDLERS,
        lifespan=service.lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app
