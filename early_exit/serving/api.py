"""What clients of the OpenAI interface ask and are told: bodies of requests and of answers.

The one idea: a field that nothing is made of is refused by name. A setting that is ignored in
silence gives another answer than was asked for. What is beyond the interface is called by names of
its own: `mode`, `thresholds`, `full`, `depths`, `top_k`.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from early_exit.decoding.sampling import Sampling

# Answers to one request, prompts times choices.
MOST_CHOICES = 128
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Zero = Annotated[float, Field(ge=0, le=0)]
_Ids = Annotated[list[int], Field(min_length=1)]


class ApiError(Exception):
    """What a client is told in place of an answer.

    Attributes:
      status: of HTTP.
      kind: `type` of OpenAI's errors.
      param: the field that is wrong.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    def body(self) -> dict[str, Any]:
        told = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class _Asked(BaseModel):
    """What both interfaces ask for.

    Attributes:
      mode: of those that the server has; its first by default.
      thresholds: of each exit, in place of the policy's; a token leaves where its score is as high.
      full: whether no exit is asked.
      depths: whether the answer says how many blocks each token took.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=0, lt=2**32)
    mode: str | None = None
    thresholds: list[float] | None = None
    full: bool = False
    depths: bool = False
    # Nothing is made of these: allowed as what changes nothing.
    presence_penalty: _Zero | None = None
    frequency_penalty: _Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def tells_log_probs(self) -> bool:
        asked = getattr(self, "logprobs", None)  # of one interface a number, of the other a bool
        return asked is not None and asked is not False

    @property
    def tells_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class Completion(_Asked):
    """Body of `/v1/completions`."""

    prompt: str | _Ids | Annotated[list[str | _Ids], Field(min_length=1)]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=1)
    echo: bool = False
    best_of: int | None = None
    suffix: None = None

    @pydantic.model_validator(mode="after")
    def _fits_together(self):
        if self.best_of not in (None, self.n):
            raise ValueError("best_of must be n, or not be given: no answer is left out")
        if self.logprobs and self.temperature:
            raise ValueError("logprobs=1 needs temperature=0; with sampling, use logprobs=0")
        if self.echo and self.stream:
            raise ValueError("echo does not go with stream")
        if not self.max_tokens and not self.echo:
            raise ValueError("max_tokens must be at least 1, unless echo is asked for")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else list(self.prompt)


class Part(BaseModel):
    """A piece of a message; only text is read."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1)]
    name: str | None = None

    def turn(self) -> dict[str, str]:
        parts = self.content
        content = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content}


class Chat(_Asked):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None
    tools: Annotated[list, Field(max_length=0)] | None = None
    response_format: None = None

    @property
    def turns(self) -> list[dict[str, str]]:
        return [message.turn() for message in self.messages]

    @property
    def most(self) -> int | None:
        """Tokens that an answer may have at most."""
        return self.max_completion_tokens or self.max_tokens


def parse(kind: type[_Asked], body: bytes) -> Any:
    """A request's body.

    Raises:
      ApiError: it is not JSON, or not what it should be; the first fault is named.
    """
    try:
        return kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(x) for x in fault["loc"] if isinstance(x, int) or x.isidentifier())
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = "no such field here"
        told = f"{where}: {message}" if where else message
        raise ApiError(400, told, param=where or None) from None


class Reply:
    """The frame of one answer to a request, whole or in chunks."""

    def __init__(self, asked: _Asked):
        self.chat = isinstance(asked, Chat)
        self._frame = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
        }

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any]) -> dict:
        name = "chat.completion" if self.chat else "text_completion"
        return self._frame | {"object": name, "choices": choices, "usage": usage}

    def chunk(self, choices: Sequence[Mapping[str, Any]], usage: Any = None) -> dict:
        name = "chat.completion.chunk" if self.chat else "text_completion"
        told = {} if usage is None else {"usage": usage}
        return self._frame | {"object": name, "choices": choices} | told

    def choice(
        self,
        index: int,
        text: str,
        ended: str | None,
        log_probs: Any = None,
        depths: Sequence[Mapping[str, Any]] | None = None,
        *,
        delta: bool = False,
    ) -> dict[str, Any]:
        """One choice; of a chunk, what it adds (`delta`)."""
        told: dict[str, Any] = {"index": index, "finish_reason": ended, "logprobs": log_probs}
        if not self.chat:
            told["text"] = text
        elif delta:
            told["delta"] = {"content": text} if text else {}
        else:
            told["message"] = {"role": "assistant", "content": text, "refusal": None}
        if depths is not None:
            told["early_exit"] = {"tokens": depths}
        return told

    def first(self, index: int) -> dict[str, Any]:
        """The choice of the first chunk, which says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}


def chat_log_probs(pieces: Sequence[str], log_probs: Sequence[float]) -> dict[str, Any]:
    """As `/v1/chat/completions` has them."""
    content = [
        {"token": piece, "logprob": float(x), "bytes": list(piece.encode()), "top_logprobs": []}
        for piece, x in zip(pieces, log_probs, strict=True)
    ]
    return {"content": content, "refusal": None}


def log_probs_of(
    pieces: Sequence[str],
    log_probs: Sequence[float | None],
    best: Sequence[Mapping[str, float] | None] | None,
    offset: int = 0,
) -> dict[str, Any]:
    """As `/v1/completions` has them.

    Args:
      best: by token, the log-probability of the most probable one and of the one that stands there.
      offset: letters before the first piece.
    """
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)
    return {
        "tokens": list(pieces),
        "token_logprobs": [None if x is None else float(x) for x in log_probs],
        "top_logprobs": None if best is None else list(best),
        "text_offset": offsets,
    }
