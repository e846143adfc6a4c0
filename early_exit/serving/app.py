"""The server: OpenAI's interface to a model that decodes with dynamic depth, and a page to try it.

The one idea: HTTP is Starlette's, decoding is the session's; what is here turns one into the other.
An error says what the client can mend, and nothing of other requests or of the machine.
"""

import contextlib
import dataclasses
import functools
import hmac
import importlib.resources
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from early_exit.decoding import drafters
from early_exit.decoding import mode as modes
from early_exit.library.model import Model
from early_exit.report import tokens as colours
from early_exit.serving import api
from early_exit.serving.answers import Added, Answers, Limits
from early_exit.serving.api import ApiError
from early_exit.serving.metrics import Metrics
from early_exit.serving.worker import Worker
from early_exit.storage import files

_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


@dataclasses.dataclass(frozen=True)
class Options:
    """How a server behaves.

    Attributes:
      name: what clients call the model.
      key: what they must send as `Authorization: Bearer …`; None asks for nothing.
      limits: of one request.
      most_bytes: of one request's body.
    """

    name: str
    key: str | None = None
    limits: Limits = Limits()
    most_bytes: int = 4 << 20


def create(model: Model, worker: Worker, options: Options) -> Starlette:
    """The application; its worker lives as long as it does."""
    server = _Server(model, worker, options)
    v1 = {
        "/v1/models": (server.models, "GET"),
        "/v1/models/{name:path}": (server.one_model, "GET"),
        "/v1/completions": (functools.partial(server.answer, kind=api.Completion), "POST"),
        "/v1/chat/completions": (functools.partial(server.answer, kind=api.Chat), "POST"),
    }
    routes = [Route(path, server.guarded(do), methods=[verb]) for path, (do, verb) in v1.items()]
    routes += [
        Route("/", server.page, methods=["GET"]),
        Route("/health", server.health, methods=["GET"]),
        Route("/metrics", server.told, methods=["GET"]),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        worker.start()
        yield
        worker.stop()

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = {404: "there is nothing at this address", 405: "not with this method"}
        return _told(ApiError(error.status_code, told.get(error.status_code, error.detail)))

    async def failed(request: Request, error: Exception) -> Response:
        server.metrics.answered.labels("500").inc()
        return _told(ApiError(500, "the server has failed; its log says why", "server_error"))

    handlers = {HTTPException: refused, Exception: failed}
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


class _Server:
    def __init__(self, model: Model, worker: Worker, options: Options):
        self._model, self._worker, self._options = model, worker, options
        self._began = int(time.time())
        self.metrics = Metrics(worker)

    def guarded(self, do):
        """An endpoint that asks for the key, and tells errors as OpenAI does."""

        async def endpoint(request: Request) -> Response:
            try:
                self._demand_key(request)
                response = await do(request)
            except ApiError as error:
                response = _told(error)
            except ClientDisconnect:
                response = Response(status_code=499)
            self.metrics.answered.labels(str(response.status_code)).inc()
            return response

        return endpoint

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._told()]})

    async def one_model(self, request: Request) -> Response:
        self._demand_model(request.path_params["name"])
        return JSONResponse(self._told())

    async def health(self, request: Request) -> Response:
        alive = self._worker.alive
        state = {"status": "ok" if alive else "stopped"}
        return JSONResponse(state, status_code=200 if alive else 503)

    async def told(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=_PROMETHEUS)

    async def page(self, request: Request) -> Response:
        return HTMLResponse(_page(self._model, self._worker, self._options))

    async def answer(self, request: Request, kind: Any) -> Response:
        asked = api.parse(kind, await self._body(request))
        self._demand_model(asked.model)
        answers = Answers(self._model, self._worker, self.metrics, asked, self._options.limits)
        reply = api.Reply(asked)
        if not asked.stream:
            return JSONResponse(await _whole(asked, answers, reply))
        # What is wrong is said with a status, so the first of it comes before the stream begins.
        stream = _chunks(asked, answers, reply)
        first = await anext(stream)
        return StreamingResponse(_sent(first, stream), media_type="text/event-stream")

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "send JSON, with Content-Type: application/json")
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._options.most_bytes:
                raise ApiError(413, f"the body has more than {self._options.most_bytes} bytes")
        return bytes(body)

    def _demand_key(self, request: Request) -> None:
        if self._options.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self._options.key.encode())
        if scheme.lower() != "bearer" or not right:
            told = "send the server's key, as Authorization: Bearer …"
            raise ApiError(401, told, "authentication_error", code="invalid_api_key")

    def _demand_model(self, name: str) -> None:
        if name != self._options.name:
            told = f"there is no model {name[:80]!r}; there is {self._options.name!r}"
            raise ApiError(404, told, param="model", code="model_not_found")

    def _told(self) -> dict[str, Any]:
        return {
            "id": self._options.name,
            "object": "model",
            "created": self._began,
            "owned_by": "early_exit",
            "early_exit": {
                "modes": list(self._worker.modes),
                "exits": list(self._model.points),
                "depth": self._model.depth,
                "context": self._model.static.config.context_length,
            },
        }


def _told(error: ApiError) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _whole(asked: Any, answers: Answers, reply: api.Reply) -> dict[str, Any]:
    """The answer to a request that is not streamed."""
    count = len(answers.prompts) * asked.n
    parts: list[list[Added]] = [[] for _ in range(count)]
    echoed, generates = getattr(asked, "echo", False), getattr(asked, "max_tokens", 1) != 0
    if generates:
        async for added in answers.stream():
            parts[added.index].append(added)
    scored = await answers.scored() if echoed and asked.tells_log_probs else None
    choices = []
    for index, added in enumerate(parts):
        text, pieces = "".join(part.text for part in added), _joined(added, "pieces")
        log_probs = _joined(added, "log_probs") if asked.tells_log_probs else None
        prompt = answers.prompts[index // asked.n] if echoed else []
        before = [answers.text([token]) for token in prompt]
        if reply.chat:
            told = log_probs and api.chat_log_probs(pieces, log_probs)
        elif log_probs is not None:
            best = [{p: x} for p, x in zip(pieces, log_probs, strict=True)]
            of_prompt: list[float | None] = []
            best_of_prompt: list[Any] = []
            if scored is not None:
                of_prompt, found = scored[index // asked.n]
                best_of_prompt = [
                    row and {answers.text([t]): x for t, x in row.items()} for row in found
                ]
            told = api.log_probs_of(
                [*before, *pieces],
                [*of_prompt, *log_probs],
                [*best_of_prompt, *best] if asked.logprobs else None,
            )
        else:
            told = None
        ended = next((part.ended for part in added if part.ended), "length")
        text = answers.text(prompt) + text if echoed else text
        depths = _depths(added) if asked.depths else None
        choices.append(reply.choice(index, text, ended, told, depths))
    return reply.whole(choices, answers.usage)


async def _chunks(asked: Any, answers: Answers, reply: api.Reply) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a request that is streamed."""
    offsets: dict[int, int] = {}
    async for added in answers.stream():
        index = added.index
        if reply.chat and index not in offsets:
            yield reply.chunk([reply.first(index)])
        told = None
        if asked.tells_log_probs:
            values = added.log_probs.tolist()
            if reply.chat:
                told = api.chat_log_probs(added.pieces, values)
            else:
                best = [{p: x} for p, x in zip(added.pieces, values, strict=True)]
                told = api.log_probs_of(
                    added.pieces, values, best if asked.logprobs else None, offsets.get(index, 0)
                )
        offsets[index] = offsets.get(index, 0) + sum(map(len, added.pieces))
        depths = _depths([added]) if asked.depths else None
        choice = reply.choice(index, added.text, added.ended, told, depths, delta=True)
        yield reply.chunk([choice])
    if asked.tells_usage:
        yield reply.chunk([], answers.usage)


async def _sent(first: dict[str, Any], rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Chunks as server-sent events; an error in their midst is the last."""
    try:
        yield _event(first)
        async for chunk in rest:
            yield _event(chunk)
    except ApiError as error:
        yield _event(error.body())
    finally:
        await rest.aclose()
    yield "data: [DONE]\n\n"


def _event(told: dict[str, Any]) -> str:
    return f"data: {files.json_text(told, ensure_ascii=False)}\n\n"


def _joined(parts: list[Added], name: str) -> list:
    return [x if isinstance(x, str) else float(x) for part in parts for x in getattr(part, name)]


def _depths(parts: list[Added]) -> list[dict[str, Any]]:
    """Each token with the blocks that proposed it; 0 or less is another drafter's mark."""
    return [
        {"text": piece, "depth": int(depth)}
        for part in parts
        for piece, depth in zip(part.pieces, part.depths, strict=True)
    ]


def _page(model: Model, worker: Worker, options: Options) -> str:
    """The page, with what it must know of the model in it."""
    exits = model.static.exit_depths.tolist()
    serving = [drafters.of(model.static, modes.named(name)) for name in worker.modes]
    sources = sorted({1 - d.place for of_mode in serving for d in of_mode if d.place}, reverse=True)
    looks = []
    for depth in [*exits, *sources]:
        behind = colours.background(depth, exits)
        look = {
            "depth": depth,
            "background": colours.hex_colour(behind),
            "colour": colours.hex_colour(colours.foreground(behind)),
            "name": f"{depth} blocks" if depth in exits else colours.named(depth),
        }
        looks.append(look)
    known = {
        "model": options.name,
        "modes": list(worker.modes),
        "looks": looks,
        "key": options.key is not None,
    }
    page = importlib.resources.files("early_exit.serving").joinpath("page.html")
    text = files.json_text(known, ensure_ascii=False).replace("<", "\\u003c")
    return page.read_text(encoding="utf-8").replace("{{known}}", text)
