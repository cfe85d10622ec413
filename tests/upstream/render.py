"""From a scripted `Reply` to status, headers and body: the one place that knows every dialect."""

from dataclasses import dataclass, replace

from . import chat, gemini, messages, responses
from .answer import CREATED, Answer, Json, encode
from .reply import Received, Reply
from .routes import PROVIDERS
from .tokens import input_tokens

_CLOSING = (chat.DONE.strip(), b"event: message_stop", b"event: response.completed")
_HEADERS: dict[str, dict[str, str]] = {
    "openai": {"openai-processing-ms": "42", "openai-version": "2020-10-01"},
    "groq": {"x-ratelimit-remaining-requests": "999", "x-ratelimit-remaining-tokens": "99999"},
}
_ID_HEADERS = {
    "anthropic": "request-id",
    "openrouter": "X-Generation-Id",
    "siliconflow": "x-siliconcloud-trace-id",
}
MODELS = ("fake-large", "fake-small")


@dataclass(frozen=True)
class Rendered:
    """A reply ready for the wire: `events` if it is a stream, else `body`."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""
    events: list[bytes] | None = None


def provider_of(received: Received, reply: Reply) -> str:
    """Return whose quirks the reply has: the scripted provider's, else the host's."""
    if reply.provider:
        return reply.provider
    return PROVIDERS.get(received.host, "openai")


def render(received: Received, reply: Reply, number: int) -> Rendered:
    """Return what goes to the client for this request."""
    a = Answer(reply, received, number, provider_of(received, reply))
    route = received.route
    json_type = "application/json; charset=UTF-8" if _google(a) else "application/json"
    headers = {"content-type": json_type, _ID_HEADERS.get(a.provider, "x-request-id"): a.id("req_")}
    headers |= _HEADERS.get(a.provider, {})

    def plain(body: bytes, status: int = 200) -> Rendered:
        if reply.body is not None:
            body = reply.body
        return Rendered(status, list((headers | reply.headers).items()), body)

    if reply.status >= 400:
        default = f"The fake provider answers {reply.status}."
        return plain(encode(_failure(a, reply.status, reply.error or default)), reply.status)
    if reply.body is not None or reply.status != 200:
        return plain(b"", reply.status)
    if received.header("upgrade") == "websocket":
        return plain(encode(_failure(a, 426, "WebSockets are not served here.")), 426)
    if route is None:
        return plain(encode(_failure(a, 404, f"Unknown path: {received.path}")), 404)
    if route.operation == "models":
        return plain(encode(_models(a)))
    if received.method != "POST":
        return plain(encode(_failure(a, 405, "Use POST.")), 405)
    if received.asked is None:
        return plain(encode(_failure(a, 400, "We could not parse the JSON body.")), 400)
    if route.operation == "count_tokens":
        name = "totalTokens" if route.dialect == "gemini" else "input_tokens"
        return plain(encode({name: input_tokens(received.body)}))
    if received.model is None:
        return plain(encode(_failure(a, 400, "you must provide a model parameter")), 400)
    if route.dialect == "openai" and (refused := chat.refusal(a)):
        return plain(encode(refused[1]), refused[0])
    if not (received.stream or reply.events is not None):
        complete = {
            "openai": chat.complete,
            "responses": responses.complete,
            "anthropic": messages.complete,
            "gemini": gemini.complete,
        }[route.dialect]
        return plain(complete(a))
    events = _stream(a)
    array = route.dialect == "gemini" and "alt=sse" not in received.query.split("&")
    if not array:
        headers["content-type"] = (
            "text/event-stream" if _google(a) else "text/event-stream; charset=utf-8"
        )
        headers["cache-control"] = "no-cache"
        newline = reply.framing.newline or ("\r\n" if route.dialect == "gemini" else "\n")
        # Raw events are sent as they are; rendered ones have no line feed inside their JSON.
        if newline != "\n" and reply.events is None:
            events = [e.replace(b"\n", newline.encode()) for e in events]
    return Rendered(200, list((headers | reply.headers).items()), events=events)


def _google(a: Answer) -> bool:
    route = a.received.route
    if route and route.operation == "models":  # /v1/models is Google's too; its key's name tells
        return route.dialect == "gemini" or a.received.header("x-goog-api-key") is not None
    return route is not None and route.dialect == "gemini"


def unauthorised(received: Received, number: int, message: str) -> Rendered:
    """Return a 401 in the dialect of the request."""
    return render(received, replace(Reply(), status=401, error=message), number)


def _failure(a: Answer, status: int, message: str) -> Json:
    kind = a.reply.error_type
    dialect = a.received.route.dialect if a.received.route else "openai"
    if dialect == "anthropic" or (a.provider == "anthropic" and dialect == "openai"):
        return messages.failure(status, message, kind, a.id("req_"))
    if dialect == "gemini":
        return gemini.failure(status, message, kind)
    return chat.failure(status, message, kind)


def _models(a: Answer) -> Json:
    if _google(a):
        return {
            "models": [
                {
                    "name": f"models/{m}",
                    "version": "001",
                    "displayName": m,
                    "inputTokenLimit": 1_048_576,
                    "outputTokenLimit": 65_536,
                    "supportedGenerationMethods": ["generateContent", "countTokens"],
                }
                for m in MODELS
            ]
        }
    if a.provider == "anthropic" or a.received.header("anthropic-version"):
        data: list[Json] = [
            {
                "type": "model",
                "id": m,
                "display_name": m,
                "created_at": "2025-10-01T00:00:00Z",
                "lifecycle": "active",
            }
            for m in MODELS
        ]
        first, last = MODELS[0], MODELS[-1]
        return {"data": data, "has_more": False, "first_id": first, "last_id": last}
    data = [{"id": m, "object": "model", "created": CREATED, "owned_by": "fake"} for m in MODELS]
    if a.provider == "kimi-code":
        data = [{**m, "context_length": 262_144} for m in data]
    return {"object": "list", "data": data}


def _stream(a: Answer) -> list[bytes]:
    reply, route = a.reply, a.received.route
    if reply.events is not None:
        return list(reply.events)
    assert route is not None
    stream = {
        "openai": chat.stream,
        "responses": responses.stream,
        "anthropic": messages.stream,
        "gemini": gemini.stream,
    }[route.dialect]
    events = list(stream(a))
    if reply.stream_error is not None:
        events = events[: reply.stream_error_after]
        match route.dialect:
            case "openai":
                events.append(chat.stream_failure(a, reply.stream_error))
            case "responses":
                events.append(responses.stream_failure(a, reply.stream_error, len(events)))
            case "anthropic":
                events.append(messages.stream_failure(a, reply.stream_error))
            case "gemini":
                events.append(gemini.stream_failure(a, reply.stream_error))
    if "no_end" in reply.malformed and events[-1].startswith(_end_marks(a)):
        events.pop()
    if "invalid_json" in reply.malformed:
        events.insert(len(events) // 2, b'data: {"id":"broken","choices":[{"delta":\n\n')
    if "half_event" in reply.malformed:
        events[-1] = events[-1][: len(events[-1]) // 2]
    return events


def _end_marks(a: Answer) -> tuple[bytes, ...]:
    if _google(a) and not a.received.query:
        return (b"]",)
    return (*_CLOSING, b"event: response.incomplete")
