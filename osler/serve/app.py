"""The endpoints, as OpenAI's clients know them (FastAPI, extra ``serve``); ``process.py`` runs them.

A server with a key answers only requests that carry it; one without a key that listens on localhost answers only requests to that
name. A body must be declared as JSON: then a browser asks the server before a page of another site may send one, and the server
never agrees. Every error has OpenAI's form; an error in the middle of a stream is an event of the stream.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from osler.runtime.errors import UserError
from osler.serve.config import ChatRequest, CompletionRequest, OptionsRequest, ServeConfig
from osler.serve.errors import ApiError
from osler.serve.metrics import CONTENT_TYPE, Labels, Metrics
from osler.serve.openapi import RESPONSES, body_of, with_bodies
from osler.serve.options import example_of, read_options
from osler.serve.page import chat_page
from osler.serve.replies import Piece, Reply
from osler.serve.requests import Asked, chat_rows, completion_rows, read_request, refused
from osler.serve.worker import Drawing, Served, Worker

try:
    from fastapi import Depends, FastAPI, Request
    from fastapi.openapi.utils import get_openapi
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
except ImportError as error:
    raise UserError("FastAPI is not installed: pip install -e '.[serve]' in Osler's source tree") from error

logger = logging.getLogger(__name__)

BODY_SECONDS = 30.0  # the time that a client has to send a body
MOST_BODIES = 16  # times the limit that is read of a larger body: a client hears nothing while it still sends
OWN_NAMES = ("localhost", "127.0.0.1", "::1")  # by which a machine reaches itself
NO_PATH = (
    "There is no such path. Osler has /v1/chat/completions, /v1/completions, /v1/options and /v1/models, /health, /metrics, and "
    "a page at /; the base URL of a client ends in /v1."
)
LEFT = 499  # the status that is counted for a request whose client left before its answer


class Events(StreamingResponse):
    """Server-sent events; ``close`` is called at their end, whatever ends them."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._close = close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


class Api:
    """The endpoints and their answers. ``is_draining`` is set when the server is about to stop; then it takes no new request."""

    def __init__(self, worker: Worker, config: ServeConfig, api_key: str | None) -> None:
        self.worker, self.config, self.metrics = worker, config, Metrics()
        self.is_draining = False
        self._key_hash = None if api_key is None else hashlib.sha256(api_key.encode()).digest()
        created = int(time.time())
        self._models = {name: {**_described(served), "created": created} for name, served in worker.models.items()}
        self._page, self._page_headers = chat_page()

    def app(self) -> FastAPI:
        """Return the application."""
        app = FastAPI(title="Osler", docs_url=None, redoc_url=None, lifespan=self._lifespan)
        trusted = [Depends(self._check_client)]
        for path, kind, answer in (
            ("/v1/chat/completions", ChatRequest, self.chat),
            ("/v1/completions", CompletionRequest, self.complete),
            ("/v1/options", OptionsRequest, self.options),
        ):
            app.add_api_route(
                path,
                answer,
                methods=["POST"],
                dependencies=trusted,
                responses=RESPONSES,
                response_model=None,
                openapi_extra=body_of(kind),
            )
        for path, read, needs, form in (
            ("/v1/models", self.list_models, trusted, JSONResponse),
            ("/v1/models/{name:path}", self.model, trusted, JSONResponse),
            ("/metrics", self.numbers, trusted, PlainTextResponse),
            ("/health", self.health, [], JSONResponse),
            ("/", self.page, [], HTMLResponse),
        ):
            for method in ("GET", "HEAD"):
                app.add_api_route(
                    path,
                    read,
                    methods=[method],
                    dependencies=needs,
                    responses=RESPONSES,
                    response_class=form,
                    response_model=None,
                    include_in_schema=method == "GET",
                )
        app.add_exception_handler(ApiError, self._answer_error)
        app.add_exception_handler(404, _always(ApiError(404, NO_PATH, "not_found")))
        app.add_exception_handler(405, _wrong_method)
        app.add_exception_handler(500, _always(ApiError(500, "Osler failed; its log says how.", "failed")))
        app.openapi = lambda: with_bodies(get_openapi(title=app.title, version="1", routes=app.routes))  # type: ignore[method-assign]
        return app

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.worker.start()
        yield
        self.worker.stop()

    # ---- endpoints

    async def chat(self, request: Request) -> Response:
        """Answer a question."""
        return await self._answer(request, self._read_chat)

    async def complete(self, request: Request) -> Response:
        """Continue texts."""
        return await self._answer(request, self._read_completion)

    async def options(self, request: Request) -> dict[str, Any]:
        """Return the probability of each option of a pasted question."""
        asked = await asyncio.to_thread(read_request, OptionsRequest, await self._body(request))
        served = self._served(asked.model)
        if asked.reasoning_content and not served.ready.answers_questions:
            message = f"{served.name} was trained on text alone and does not think before an answer: leave reasoning_content out."
            raise ApiError(400, message, "invalid_value", "reasoning_content")
        with refused("question"):  # long texts take a while to tokenise
            question = await asyncio.to_thread(read_options, served.ready, asked.question, asked.reasoning_content)
        if (length := question.start) > served.longest_prompt:
            message = f"The question has {length} tokens, and {served.name} takes at most {served.longest_prompt}: shorten it."
            raise ApiError(400, message, "context_length_exceeded", "question")
        shares = await self.worker.call(lambda: question.probabilities(served.batch.decoder))
        self.count(request.url.path, served.name, 200)
        return {"object": "options", "model": served.name, **question.described(shares)}

    async def page(self) -> Response:
        """Return the chat page, which needs no key: it asks the user for one if the other endpoints need it."""
        return HTMLResponse(self._page, headers=self._page_headers)

    async def list_models(self) -> dict[str, Any]:
        """List the models; the first answers requests that name none."""
        return {"object": "list", "data": list(self._models.values())}

    async def model(self, name: str) -> dict[str, Any]:
        """Describe a model."""
        return self._models[self._served(name).name]

    async def numbers(self) -> Response:
        """Return the server's metrics, for Prometheus."""
        outstanding = {name: served.outstanding for name, served in self.worker.models.items()}
        return Response(self.metrics.text(outstanding, self.config.max_rows), media_type=CONTENT_TYPE)

    async def health(self) -> Response:
        """Say whether requests are taken."""
        return JSONResponse({"status": "draining" if self.is_draining else "ok"}, 503 if self.is_draining else 200)

    # ---- shared by the endpoints

    async def _check_client(self, request: Request) -> None:
        """Raise ApiError for a client without the key; without a key, for one that calls localhost by a foreign name."""
        if self._key_hash is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(hashlib.sha256(given.strip().encode()).digest(), self._key_hash)
            if scheme.lower() != "bearer" or not is_right:
                message = "The API key is missing or wrong: send `Authorization: Bearer KEY`."
                raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        elif self.config.host in OWN_NAMES:
            name = request.headers.get("host", "localhost").strip().lower()  # HTTP/1.0 may leave it out; every browser sends it
            name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
            if name not in OWN_NAMES:  # another site's name that its owner pointed at this machine (DNS rebinding)
                raise ApiError(403, f"This server answers to localhost alone, not to {name!r}.", "wrong_host")

    def _served(self, name: str | None) -> Served:
        models = self.worker.models
        if name is None:
            return next(iter(models.values()))
        if name not in models:
            raise ApiError(404, f"There is no model {name!r}; there are: {', '.join(models)}.", "model_not_found", "model")
        return models[name]

    async def _body(self, request: Request) -> bytes:
        """Return a JSON body. Raises ApiError for one that is too large or too slow, or when the server drains."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "Send JSON, with the header Content-Type: application/json.", "unsupported_media_type")
        if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
            raise ApiError(415, f"The body is compressed ({encoding}): send it as it is.", "unsupported_media_type")
        limit, data, received, is_more = self.config.max_body_bytes, bytearray(), 0, True
        close = {"Connection": "close"}
        deadline = time.monotonic() + BODY_SECONDS
        while is_more and received <= MOST_BODIES * limit:
            try:
                message = await asyncio.wait_for(request.receive(), max(deadline - time.monotonic(), 0))
            except asyncio.TimeoutError:
                raise ApiError(408, f"The body did not arrive in {BODY_SECONDS:g} seconds.", "timeout", headers=close) from None
            received += len(part := message.get("body", b""))
            is_more = message.get("more_body", False)
            data += part if received <= limit else b""
        if received > limit:
            raise ApiError(413, f"The body has more than {limit} bytes.", "too_large", headers=close if is_more else {})
        if self.is_draining:
            raise ApiError(503, "The server is about to stop.", "draining", headers={"Retry-After": "5"})
        return bytes(data)

    def _read_chat(self, body: bytes) -> Asked:
        request = read_request(ChatRequest, body)
        return chat_rows(request, self._served(request.model))

    def _read_completion(self, body: bytes) -> Asked:
        request = read_request(CompletionRequest, body)
        return completion_rows(request, self._served(request.model))

    async def _answer(self, request: Request, read: Callable[[bytes], Asked]) -> Response:
        began = time.monotonic()
        body = await self._body(request)
        asked = await asyncio.to_thread(read, body)  # long texts take a while to read and tokenise
        drawing = self.worker.draw(asked.served, asked.rows)
        meter = _RequestMeter(self, request.url.path, asked, began)
        limit = self.config.max_seconds
        too_long = ApiError(504, f"The answer took more than {limit:g} seconds.", "timeout", headers={"x-should-retry": "false"})
        timer = asyncio.get_running_loop().call_later(limit, drawing.fail, too_long)

        def close() -> None:
            timer.cancel()
            drawing.cancel()
            meter.close()

        if asked.given.stream:
            return Events(_events(drawing, meter), close)
        work = asyncio.create_task(_whole(drawing, meter))
        leaves = asyncio.create_task(_until_gone(request))
        try:
            await asyncio.wait({work, leaves}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(work.result()) if work.done() else Response(status_code=LEFT)
        except ApiError as error:
            meter.status = error.status
            return _error_response(error)
        except Exception:
            meter.status = 500
            raise
        finally:
            work.cancel()
            leaves.cancel()
            close()

    async def _answer_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        self.count(getattr(request.scope.get("route"), "path", ""), "", error.status)
        return _error_response(error)

    def count(self, path: str, model: str, status: int, said: str = "") -> None:
        """Count a request, and log it if ``log_requests`` is set."""
        self.metrics.requests[("model", model), ("path", path), ("status", str(status))] += 1
        if self.config.log_requests:
            logger.info(f"{path} {status} {model} {said}".rstrip())


class _RequestMeter:
    """Follows one request to its end: its reply, its status, and the numbers that metrics and log get."""

    def __init__(self, api: Api, path: str, asked: Asked, began: float) -> None:
        self.reply = Reply(asked)
        self._api, self._path, self._began = api, path, began
        self._labels: Labels = (("model", asked.served.name),)
        self._first: float | None = None
        self.status = LEFT
        api.metrics.prompt_tokens[self._labels] += self.reply.asked.prompt_tokens

    def mark_first(self) -> None:
        """Note the time of the first token; later calls do nothing."""
        if self._first is None:
            self._first = time.monotonic()
            self._api.metrics.first_token[self._labels].observe(self._first - self._began)

    def close(self) -> None:
        """Count the request; call it at the end."""
        metrics, now = self._api.metrics, time.monotonic()
        tokens = [choice.tokens for choice in self.reply.choices]
        metrics.drawn_tokens[self._labels] += sum(tokens)
        metrics.whole[self._labels].observe(now - self._began)
        if self._first is not None and max(tokens) > 1:
            metrics.between_tokens[self._labels].observe((now - self._first) / (max(tokens) - 1))
        if self.status == LEFT:
            metrics.cancelled[self._labels] += 1
        said = f"{self.reply.asked.prompt_tokens} + {sum(tokens)} tokens in {now - self._began:.3f} s"
        self._api.count(self._path, self._labels[0][1], self.status, said)


def _described(served: Served) -> dict[str, Any]:
    """Return the description of a model; OpenAI's clients read its first three fields."""
    ready = served.ready
    return {
        "id": served.name,
        "object": "model",
        "owned_by": "osler",
        "max_model_len": ready.model.config.max_seq_len,
        "parameters": ready.model.config.num_parameters,
        "answers_questions": ready.answers_questions,
        "reasons": ready.answers_questions and ready.reasons,
        "example": example_of(ready),
    }


async def _pieces(drawing: Drawing, meter: _RequestMeter) -> Sequence[tuple[int, Sequence[Piece]]]:
    """Wait for tokens, and return the new text of each completion that has any."""
    found = []
    news = await drawing.news()
    meter.mark_first()
    for index, continuation in news.items():
        choice = meter.reply.choices[index]
        found.append((index, choice.add(continuation)))
        if choice.finish is not None:
            drawing.cancel(index)  # its row may still be drawing after a stop text; this ends it
    return found


async def _whole(drawing: Drawing, meter: _RequestMeter) -> dict[str, Any]:
    reply = meter.reply
    pieces: list[list[Piece]] = [[] for _ in reply.choices]
    while not reply.is_finished:
        for index, new in await _pieces(drawing, meter):
            pieces[index] += new
    meter.status = 200
    return reply.whole(pieces)


async def _events(drawing: Drawing, meter: _RequestMeter) -> AsyncIterator[bytes]:
    reply = meter.reply
    try:
        yield _event(*reply.first_chunks())
        while not reply.is_finished:
            for index, new in await _pieces(drawing, meter):
                if chunks := reply.chunks(index, new):
                    yield _event(*chunks)
        meter.status = 200
        yield _event(*reply.last_chunks()) + b"data: [DONE]\n\n"
    except ApiError as error:
        meter.status = error.status
        yield _event(error.body())
    except Exception:
        meter.status = 500
        yield _event(ApiError(500, "Osler failed; its log says how.", "failed").body())
        raise


def _event(*chunks: dict[str, Any]) -> bytes:
    # Every character but ASCII is escaped, because many clients end a line at U+2028 and some others.
    return b"".join(b"data: %s\n\n" % json.dumps(chunk).encode() for chunk in chunks)


def _error_response(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def _until_gone(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _always(error: ApiError) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(request: Request, cause: Exception) -> Response:
        return JSONResponse(error.body(), error.status, getattr(cause, "headers", None))

    return answer


async def _wrong_method(request: Request, cause: Any) -> Response:
    message = f"{request.url.path} takes {cause.headers['Allow']}, not {request.method}."
    return JSONResponse(ApiError(405, message, "wrong_method").body(), 405, cause.headers)
