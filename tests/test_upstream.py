import gzip
import importlib.util
import itertools
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from google import genai
from google.genai import types

from upstream import (
    PROVIDER_HOSTS,
    Abort,
    Framing,
    Match,
    Received,
    Reply,
    TokenUsage,
    ToolCall,
    Upstream,
    conversation,
    conversation_replies,
    filler,
    input_tokens,
    output_tokens,
)

CALL = ToolCall("call12345", "read_file", '{"path": "src/naïve.py", "lines": [1, 2]}')
ASK = {"model": "m1", "messages": [{"role": "user", "content": "hi"}]}
PATHS = {
    "openai": "/v1/chat/completions",
    "responses": "/v1/responses",
    "anthropic": "/v1/messages",
    "gemini": "/v1beta/models/m1:streamGenerateContent?alt=sse",
}
# One client for all plain requests: a new one reads the system's certificates each time.
PLAIN = httpx.Client(verify=False)
dialects = pytest.mark.parametrize("dialect", PATHS)


@pytest.fixture(scope="module")
def server() -> Iterator[Upstream]:
    with Upstream() as up:
        yield up


@pytest.fixture
def up(server: Upstream) -> Upstream:
    server.clear()
    server.default = Reply()
    return server


@dataclass
class Wire:
    """What stood on the socket: the head, HTTP/1.1 chunks (else one), and whether it ended well."""

    head: str
    chunks: list[bytes]
    times: list[float]
    complete: bool
    reset: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)


def request(
    port: int,
    path: str,
    body: dict[str, Any] | bytes | None,
    *headers: str,
    context: ssl.SSLContext | None = None,
) -> socket.socket:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    content = b"" if body is None else content
    lines = [f"{method} {path} HTTP/1.1", "Host: fake", f"Content-Length: {len(content)}", *headers]
    sock = socket.create_connection(("127.0.0.1", port), timeout=5)
    if context:
        sock = context.wrap_socket(sock, server_hostname="localhost")
    sock.sendall("\r\n".join([*lines, "\r\n"]).encode() + content)
    return sock


def read(sock: socket.socket) -> Wire:
    """Read one reply from a raw socket, chunk by chunk."""
    wire = Wire("", [], [], False)
    with sock, sock.makefile("rb") as file:
        try:
            while (line := file.readline()) not in (b"\r\n", b""):
                wire.head += line.decode()
            head = wire.head.lower()
            if "transfer-encoding: chunked" in head:
                while (size := file.readline()).endswith(b"\r\n"):
                    if int(size, 16) == 0:
                        wire.complete = file.readline() == b"\r\n"
                        break
                    wire.chunks.append(file.read(int(size, 16)))
                    wire.times.append(time.monotonic())
                    file.read(2)
            elif "content-length: " in head:
                length = int(head.split("content-length: ")[1].split("\r\n")[0])
                wire.chunks.append(file.read(length))
                wire.complete = len(wire.body) == length
            else:
                wire.chunks.append(file.read())
        except ConnectionResetError:
            wire.reset = True
    return wire


def stream(up: Upstream, *headers: str, dialect: str = "openai", **body: Any) -> Wire:
    given = {**ASK, "stream": True, **body}
    return read(request(up.http_port, PATHS[dialect], given, *headers))


def data(body: bytes) -> list[dict[str, Any]]:
    """The JSON payloads of an event stream that is known to be well formed."""
    lines = body.decode().splitlines()
    found = [line[6:] for line in lines if line.startswith("data: ")]
    return [json.loads(x) for x in found if x != "[DONE]"]


def tls(up: Upstream) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(up.ca_file))


def post(up: Upstream, host: str, path: str, body: dict[str, Any], **headers: str) -> Any:
    """A plain POST as if to the provider's host."""
    return PLAIN.post(up.http_url + path, json=body, headers={"host": host, **headers})


# The real SDKs


def openai_client(up: Upstream, prefix: str = "/v1") -> openai.OpenAI:
    return openai.OpenAI(base_url=up.http_url + prefix, api_key="k", max_retries=0)


def test_the_openai_sdk_reads_a_plain_reply_with_reasoning_tools_and_usage(up: Upstream) -> None:
    up.default = Reply(text="Hé", reasoning="let me think", tool_calls=(CALL,))
    got = openai_client(up).chat.completions.create(**ASK)
    choice = got.choices[0]
    assert choice.message.content == "Hé"
    assert choice.message.reasoning_content == "let me think"  # type: ignore[attr-defined]
    assert choice.message.tool_calls[0].function.arguments == CALL.arguments
    assert choice.finish_reason == "tool_calls"
    assert got.usage.prompt_tokens == input_tokens(up.requests[-1].body)
    expected = up.default.usage_for(up.requests[-1])
    assert got.usage.completion_tokens == expected.output
    assert got.usage.completion_tokens_details.reasoning_tokens == expected.reasoning == 3


@pytest.mark.parametrize("asked", [False, True])
def test_the_openai_sdk_gets_stream_usage_only_if_it_asked(up: Upstream, asked: bool) -> None:
    up.default = Reply(text="Hello, wörld!", tool_calls=(CALL,), delta_chars=3)
    options = {"stream_options": {"include_usage": True}} if asked else {}
    chunks = list(openai_client(up).chat.completions.create(**ASK, stream=True, **options))
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert "".join(d.content or "" for d in deltas) == "Hello, wörld!"
    calls = [t for d in deltas for t in d.tool_calls or ()]
    assert [calls[0].id, calls[0].function.name] == [CALL.id, CALL.name]
    assert "".join(t.function.arguments for t in calls) == CALL.arguments
    usages = [c.usage for c in chunks if c.usage]
    assert len(usages) == asked
    if asked:
        assert not chunks[-1].choices
        assert usages[0].prompt_tokens == input_tokens(up.requests[-1].body)


def test_the_openai_sdk_reads_responses_streamed_and_not(up: Upstream) -> None:
    up.default = Reply(text="Hello", reasoning="hmm, well", tool_calls=(CALL,))
    client = openai_client(up)
    plain = client.responses.create(model="m1", input="hi")
    assert plain.output_text == "Hello"
    assert [i.type for i in plain.output] == ["reasoning", "message", "function_call"]
    assert plain.usage.input_tokens == input_tokens(up.requests[-1].body)
    with client.responses.stream(model="m1", input="hi") as events:
        seen = list(events)
        final = events.get_final_response()
    assert [e.sequence_number for e in seen] == list(range(len(seen)))
    assert final.output_text == "Hello"
    assert final.output[2].arguments == CALL.arguments
    assert seen[-1].type == "response.completed"
    assert final.usage.output_tokens_details.reasoning_tokens == output_tokens("hmm, well")


def test_the_anthropic_sdk_reads_messages_streamed_and_not(up: Upstream) -> None:
    usage = TokenUsage(input=100, output=30, cached=60, cache_write=15, reasoning=5)
    up.default = Reply(text="Hello", reasoning="hmm", tool_calls=(CALL,), usage=usage)
    client = anthropic.Anthropic(base_url=up.http_url, api_key="k", max_retries=0)
    plain = client.messages.create(**ASK, max_tokens=99)
    with client.messages.stream(**ASK, max_tokens=99) as events:
        names = [e.type for e in events]
        streamed = events.get_final_message()
    for got in (plain, streamed):
        assert [b.type for b in got.content] == ["thinking", "text", "tool_use"]
        assert got.content[2].input == json.loads(CALL.arguments)
        assert got.stop_reason == "tool_use"
        # The three kinds of input are disjoint.
        assert got.usage.input_tokens == 25
        assert got.usage.cache_read_input_tokens == 60
        assert got.usage.cache_creation_input_tokens == 15
        assert got.usage.output_tokens == 30
    assert names[0] == "message_start"
    assert names[-1] == "message_stop"
    assert client.messages.count_tokens(**ASK).input_tokens == input_tokens(up.requests[-1].body)


def test_the_google_sdk_reads_generate_content_streamed_and_not(up: Upstream) -> None:
    up.default = Reply(text="Hello there", reasoning="hmm", tool_calls=(CALL,), delta_chars=4)
    options = types.HttpOptions(base_url=up.http_url)
    client = genai.Client(api_key="k", http_options=options)
    plain = client.models.generate_content(model="m1", contents="hi")
    chunks = list(client.models.generate_content_stream(model="m1", contents="hi"))
    assert plain.text == "Hello there"
    assert plain.function_calls[0].args == json.loads(CALL.arguments)
    assert "".join(c.text or "" for c in chunks) == "Hello there"
    assert chunks[-1].function_calls[0].name == "read_file"
    assert chunks[-1].candidates[0].finish_reason == "STOP"
    assert all(c.usage_metadata for c in chunks)
    spent = up.default.usage_for(up.requests[-1])
    final = chunks[-1].usage_metadata
    assert final.thoughts_token_count == spent.reasoning == 1
    assert final.candidates_token_count == spent.output - spent.reasoning


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 529])
def test_each_sdk_understands_an_error_of_its_dialect(up: Upstream, status: int) -> None:
    up.default = Reply(status=status, error="what went wrong", headers={"retry-after": "7"})
    with pytest.raises(openai.APIStatusError, match="what went wrong") as of_openai:
        openai_client(up).chat.completions.create(**ASK)
    assert of_openai.value.response.headers["retry-after"] == "7"
    client = anthropic.Anthropic(base_url=up.http_url, api_key="k", max_retries=0)
    with pytest.raises(anthropic.APIStatusError, match="what went wrong") as of_anthropic:
        client.messages.create(**ASK, max_tokens=9)
    google = genai.Client(api_key="k", http_options=types.HttpOptions(base_url=up.http_url))
    with pytest.raises(genai.errors.APIError, match="what went wrong") as of_google:
        google.models.generate_content(model="m1", contents="hi")
    assert {of_openai.value.status_code, of_anthropic.value.status_code} == {status}
    assert of_google.value.code == status


def test_the_sdks_see_an_error_in_a_stream_that_began_well(up: Upstream) -> None:
    up.default = Reply(stream_error="Overloaded")
    got = []
    with pytest.raises(openai.APIError, match="Overloaded"):
        got.extend(openai_client(up).chat.completions.create(**ASK, stream=True))
    assert len(got) == up.default.stream_error_after
    events = list(openai_client(up).responses.create(model="m1", input="hi", stream=True))
    assert [e.type for e in events[-2:]] == ["error", "response.failed"]
    assert events[-1].response.error.message == "Overloaded"
    client = anthropic.Anthropic(base_url=up.http_url, api_key="k", max_retries=0)
    with pytest.raises(anthropic.APIStatusError, match="Overloaded"):
        list(client.messages.create(**ASK, max_tokens=9, stream=True))


def test_an_sdk_recovers_from_one_429(up: Upstream) -> None:
    retry = {"retry-after-ms": "1"}
    up.script("/v1/chat/completions", Reply(status=429, headers=retry), Reply(text="ok"))
    client = openai.OpenAI(base_url=up.http_url + "/v1", api_key="k", max_retries=1)
    assert client.chat.completions.create(**ASK).choices[0].message.content == "ok"
    assert up.count == 2


def test_models_are_listed_as_each_sdk_expects(up: Upstream) -> None:
    names = [m.id for m in openai_client(up).models.list()]
    client = anthropic.Anthropic(base_url=up.http_url, api_key="k")
    google = genai.Client(api_key="k", http_options=types.HttpOptions(base_url=up.http_url))
    assert [m.id for m in client.models.list()] == names
    assert [m.name for m in google.models.list()] == [f"models/{n}" for n in names]


# TLS and HTTP/2


@pytest.mark.parametrize("http2", [False, True])
@dialects
def test_tls_serves_both_http_versions(up: Upstream, dialect: str, http2: bool) -> None:
    with httpx.Client(http2=http2, verify=tls(up)) as client:
        for _ in range(2):
            got = client.post(up.https_url + PATHS[dialect], json={**ASK, "stream": True})
            assert got.status_code == 200
    assert got.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
    last = up.requests[-1]
    assert last.http_version == ("HTTP/2.0" if http2 else "HTTP/1.1")
    assert (last.scheme, last.host, last.sni) == ("https", "localhost", "localhost")
    assert any(name == "host" for name, _ in last.headers) is False or not http2


def test_an_sdk_works_over_http2(up: Upstream) -> None:
    # The SDK's own HTTP library: httpx2 since its 3.0, httpx before.
    library = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")
    with library.Client(http2=True, verify=tls(up)) as client:
        sdk = openai.OpenAI(base_url=up.https_url + "/v1", api_key="k", http_client=client)
        text = "".join(
            c.choices[0].delta.content or ""
            for c in sdk.chat.completions.create(**ASK, stream=True)
            if c.choices
        )
    assert text == filler(120)
    assert up.requests[-1].http_version == "HTTP/2.0"


def test_http2_carries_more_than_its_windows_both_ways(up: Upstream) -> None:
    up.default = Reply(text="x" * 3_000_000, delta_chars=1_000_000)
    big = {**ASK, "padding": "y" * 17_000_000}
    with httpx.Client(http2=True, verify=tls(up)) as client:
        got = client.post(up.https_url + "/v1/chat/completions", json=big)
    assert got.json()["choices"][0]["message"]["content"] == up.default.text
    assert len(up.requests[-1].body) > 17_000_000


def test_alpn_can_be_restricted_or_left_out() -> None:
    with Upstream(alpn=()) as up, httpx.Client(http2=True, verify=tls(up)) as client:
        assert client.post(up.https_url + PATHS["openai"], json=ASK).http_version == "HTTP/1.1"


def test_the_certificate_is_good_for_every_provider_and_no_other_name(up: Upstream) -> None:
    def handshake(name: str) -> str | None:
        with socket.create_connection(("127.0.0.1", up.https_port), timeout=5) as sock:
            context = tls(up)
            context.set_alpn_protocols(["h2"])
            with context.wrap_socket(sock, server_hostname=name) as secured:
                return secured.selected_alpn_protocol()

    assert {handshake(h) for h in PROVIDER_HOSTS} == {"h2"}
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake("example.org")


# Framing, on the raw socket


def test_each_event_is_a_chunk_of_its_own(up: Upstream) -> None:
    wire = stream(up)
    assert wire.complete
    assert all(c.endswith(b"\n\n") and c.count(b"\n\n") == 1 for c in wire.chunks)
    assert wire.chunks[-1] == b"data: [DONE]\n\n"


def test_a_stream_is_cut_as_told_and_stays_the_same_bytes(up: Upstream) -> None:
    events = stream(up)
    for pieces, sizes in (
        ("whole", [len(events.body)]),
        (100, None),
        ((1, 7, 7_000_000), [1, 6, len(events.body) - 7]),
    ):
        up.default = Reply(framing=Framing(pieces=pieces))
        wire = stream(up)
        assert _without_ids(wire.body) == _without_ids(events.body)
        lengths = [len(c) for c in wire.chunks]
        assert lengths == sizes if sizes else set(lengths[:-1]) == {100}


def _without_ids(body: bytes) -> list[dict[str, Any]]:
    return [{**d, "id": ""} for d in data(body)]


def test_delays_stand_between_pieces_and_before_the_first_byte(up: Upstream) -> None:
    up.default = Reply(size=16, framing=Framing(first_delay_s=0.1, delay_s=0.03))
    start = time.monotonic()
    wire = stream(up)
    assert wire.times[0] - start >= 0.1
    assert wire.times[-1] - wire.times[0] >= 0.03 * (len(wire.chunks) - 1) * 0.9


@pytest.mark.parametrize("pieces", ["event", 50])
def test_gzip_by_pieces_can_be_decoded_as_it_comes(up: Upstream, pieces: Any) -> None:
    up.default = Reply(framing=Framing(gzip="pieces", pieces=pieces))
    wire = stream(up, "Accept-Encoding: gzip")
    assert "content-encoding: gzip" in wire.head
    unpack = zlib.decompressobj(wbits=31)
    plain = [unpack.decompress(c) for c in wire.chunks]
    assert all(plain)
    assert plain[0].startswith(b"data: ")
    assert unpack.eof
    assert len(plain) > 5


def test_gzip_whole_is_one_member_cut_anywhere(up: Upstream) -> None:
    up.default = Reply(framing=Framing(gzip="whole", pieces=33))
    wire = stream(up, "Accept-Encoding: br, gzip")
    assert {len(c) for c in wire.chunks[:-1]} == {33}
    assert gzip.decompress(wire.body).endswith(b"data: [DONE]\n\n")


def test_gzip_waits_for_a_client_that_accepts_it_unless_told_otherwise(up: Upstream) -> None:
    up.default = Reply(framing=Framing(gzip="whole"))
    assert stream(up).body.startswith(b"data: ")
    up.default = Reply(framing=Framing(gzip="whole", gzip_unasked=True))
    assert stream(up).body.startswith(b"\x1f\x8b")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_line_ends_are_as_told(up: Upstream, newline: Any) -> None:
    up.default = Reply(framing=Framing(newline=newline))
    body = stream(up, dialect="anthropic").body
    assert body.endswith((newline * 2).encode())
    assert set(body) & set(b"\r\n") == set(newline.encode())


def test_gemini_ends_its_lines_with_crlf(up: Upstream) -> None:
    assert stream(up, dialect="gemini").body.endswith(b"}\r\n\r\n")


def test_gemini_without_sse_streams_one_json_array(up: Upstream) -> None:
    wire = read(request(up.http_port, PATHS["gemini"].split("?")[0], {"contents": []}))
    assert len(wire.chunks) > 3
    assert "".join(
        c["candidates"][0]["content"]["parts"][0]["text"] for c in json.loads(wire.body)
    ) == filler(120)


@pytest.mark.parametrize("length", ["auto", "chunked", "close"])
def test_the_length_of_a_plain_reply_is_told_as_set(up: Upstream, length: Any) -> None:
    up.default = Reply(framing=Framing(length=length, pieces=64))
    wire = read(request(up.http_port, PATHS["openai"], ASK))
    assert json.loads(wire.body)["object"] == "chat.completion"
    assert ("content-length" in wire.head) == (length == "auto")
    assert ("chunked" in wire.head) == (length == "chunked")
    assert ("connection: close" in wire.head) == (length == "close")
    assert (len(wire.chunks) > 1) == (length == "chunked")


def test_connection_close_ends_a_connection_that_otherwise_stays(up: Upstream) -> None:
    with httpx.Client() as client:
        for close, kept in ((False, True), (True, True), (False, False)):
            up.default = Reply(framing=Framing(connection_close=close))
            trace: list[str] = []
            client.post(
                up.http_url + PATHS["openai"],
                json=ASK,
                extensions={"trace": lambda name, _, trace=trace: trace.append(name)},
            )
            reused = "connection.connect_tcp.started" not in trace
            assert reused == (kept and up.count > 1)


@pytest.mark.parametrize("secured", [False, True])
@pytest.mark.parametrize("how", ["reset", "close"])
def test_an_abort_in_mid_stream_sends_just_so_many_bytes(
    up: Upstream, how: Any, secured: bool
) -> None:
    up.default = Reply(framing=Framing(abort=Abort(after=500, how=how)))
    port, context = (up.https_port, tls(up)) if secured else (up.http_port, None)
    wire = read(request(port, PATHS["openai"], {**ASK, "stream": True}, context=context))
    assert len(wire.body) == 500
    assert not wire.complete
    # Older ssl modules report a reset as an end of file: https://github.com/python/cpython/issues/115627
    if not secured or sys.version_info >= (3, 13):
        assert wire.reset == (how == "reset")


def test_an_abort_can_come_before_the_status_line(up: Upstream) -> None:
    up.default = Reply(framing=Framing(abort=Abort()))
    wire = stream(up)
    assert (wire.head, wire.reset) == ("", True)


@pytest.mark.parametrize("how", ["stream", "close", "reset"])
def test_an_abort_over_http2(up: Upstream, how: Any) -> None:
    up.default = Reply(framing=Framing(abort=Abort(after=500, how=how)))
    url, body, got = up.https_url + PATHS["openai"], {**ASK, "stream": True}, b""
    broken = (httpx.RemoteProtocolError, httpx.NetworkError)
    with httpx.Client(http2=True, verify=tls(up)) as client:
        with pytest.raises(broken), client.stream("POST", url, json=body) as reply:  # noqa: PT012
            for piece in reply.iter_raw():
                got += piece
        # A reset may meet the client while it still writes its settings, before it reads.
        assert len(got) == 500 or how == "reset"
        if how == "stream":
            up.default = Reply()
            assert client.post(url, json=ASK).status_code == 200
            assert up.count == 2


def test_malformed_streams_are_malformed_in_the_way_named(up: Upstream) -> None:
    up.default = Reply(malformed=frozenset({"invalid_json"}))
    lines = [x[6:] for x in stream(up).body.decode().split("\n") if x.startswith("data: ")]
    broken = [x for x in lines if x != "[DONE]" and not _is_json(x)]
    assert len(broken) == 1
    up.default = Reply(malformed=frozenset({"half_event"}))
    for dialect in ("openai", "anthropic", "responses", "gemini"):
        wire = stream(up, dialect=dialect)
        assert wire.complete
        assert not wire.body.endswith(b"\n")
    up.default = Reply(malformed=frozenset({"no_end"}))
    assert b"[DONE]" not in stream(up).body
    assert b"message_stop" not in stream(up, dialect="anthropic").body
    assert b"response.completed" not in stream(up, dialect="responses").body


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def test_a_huge_event_is_one_delta(up: Upstream) -> None:
    up.default = Reply(text="z" * 2_000_000, delta_chars=2_000_000)
    assert max(len(c) for c in stream(up).chunks) > 2_000_000


def test_raw_bodies_and_raw_events_are_sent_as_they_are(up: Upstream) -> None:
    up.default = Reply(body=b"\x00not json", headers={"content-type": "text/plain"})
    wire = read(request(up.http_port, "/anything", ASK))
    assert wire.body == b"\x00not json"
    assert "content-type: text/plain" in wire.head
    up.default = Reply(events=(b"data: 1\r", b"\ndata: {\xff}\r\n\r\n"))
    assert stream(up).chunks == list(up.default.events or ())


@pytest.mark.parametrize("hang_after", [None, 0, 2, 99])
def test_a_reply_hangs_until_it_is_released(up: Upstream, hang_after: int | None) -> None:
    release = threading.Event()
    up.default = Reply(framing=Framing(hang=release, hang_after=hang_after))
    with request(up.http_port, PATHS["openai"], {**ASK, "stream": True}) as sock:
        before = b""
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):  # noqa: PT012 - reads what is there
            while True:
                before += sock.recv(65536)
        assert before.count(b"data: ") == {None: 0, 0: 0, 2: 2}.get(hang_after, 11)
        assert (before == b"") == (hang_after is None)
        release.set()
        sock.settimeout(5)
        while not before.endswith(b"0\r\n\r\n"):
            before += sock.recv(65536)
    assert before.count(b"data: ") == 11


@pytest.mark.parametrize("http2", [False, True])
def test_a_client_that_leaves_is_noticed(up: Upstream, http2: bool) -> None:
    up.default = Reply(framing=Framing(hang=threading.Event(), hang_after=1))
    with httpx.Client(http2=http2, verify=tls(up)) as client:
        body = {**ASK, "stream": True}
        with client.stream("POST", up.https_url + PATHS["openai"], json=body) as reply:
            next(reply.iter_raw())
    up.wait_for(lambda u: u.abandoned == u.requests)


# Scripts, keys, records


def test_scripts_choose_by_host_path_model_and_question(up: Upstream) -> None:
    up.script("api.mistral.ai", Reply(text="by host"))
    up.script("/coding/v1/*", Reply(text="by path"))
    up.script(Match(model="kimi-*"), Reply(text="by model"), forever=True)
    up.script(lambda r: b"secret word" in r.body, lambda r: Reply(text=f"to {r.host}"))

    def said(host: str, path: str, **body: Any) -> str:
        got = post(up, host, path, {**ASK, **body}).json()
        return str(got["choices"][0]["message"]["content"])

    chat = "/v1/chat/completions"
    up.default = Reply(text="default")
    assert said("api.mistral.ai", chat) == "by host"
    assert said("api.mistral.ai", chat) == "default"
    assert said("api.kimi.com", "/coding/v1/chat/completions") == "by path"
    assert {said("a", chat, model="kimi-k2") for _ in range(3)} == {"by model"}
    assert said("a", chat, messages=[{"content": "secret word"}]) == "to a"


def test_a_failing_script_is_told_to_the_client_and_to_the_test() -> None:
    def broken(_: Received) -> Reply:
        raise KeyError("no such scenario")

    with pytest.raises(KeyError, match="no such scenario"), Upstream(default=broken) as up:
        assert PLAIN.post(up.http_url + PATHS["openai"], json=ASK).status_code == 500


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (PATHS["openai"], {"authorization": "Bearer {}"}),
        (PATHS["responses"], {"authorization": "Bearer {}"}),
        (PATHS["anthropic"], {"x-api-key": "{}"}),
        (PATHS["gemini"], {"x-goog-api-key": "{}"}),
        (PATHS["gemini"] + "&key={}", {}),
    ],
)
def test_only_the_right_key_is_taken(up: Upstream, path: str, headers: dict[str, str]) -> None:
    up.keys = {"api.example": "right"}
    up.echo_key = True

    def status(key: str) -> tuple[int, str]:
        given = {k: v.format(key) for k, v in headers.items()}
        got = post(up, "api.example", path.format(key), {**ASK, "stream": True}, **given)
        return got.status_code, got.text

    assert status("right")[0] == 200
    code, text = status("wrong-key")
    assert code == 401
    assert "wrong-key" in json.loads(text)["error"]["message"]
    up.echo_key = False
    assert "wrong-key" not in status("wrong-key")[1]
    assert post(up, "api.example", path.split("&key")[0], ASK).status_code == 401
    assert post(up, "other.example", PATHS["openai"], ASK).status_code == 200


def test_requests_are_recorded_as_they_arrived(up: Upstream) -> None:
    body = json.dumps({**ASK, "stream": False}, indent=3).encode()
    read(
        request(up.http_port, "/api/v1/chat/completions?a=1&b=%20", body, "X-OdD: One", "x-odd: 2")
    )
    got = up.requests[-1]
    assert (got.method, got.scheme, got.host) == ("POST", "http", "fake")
    assert (got.path, got.query) == ("/api/v1/chat/completions", "a=1&b=%20")
    assert got.headers[-2:] == [("X-OdD", "One"), ("x-odd", "2")]
    assert (got.body, got.model, got.stream, got.sni) == (body, "m1", False, None)


def test_chunked_and_gzipped_requests_are_understood(up: Upstream) -> None:
    packed = gzip.compress(json.dumps({**ASK, "stream": True}).encode())
    pieces = iter([packed[:10], packed[10:]])
    headers = {"content-encoding": "gzip"}
    got = PLAIN.post(up.http_url + PATHS["openai"], content=pieces, headers=headers)
    assert got.headers["content-type"].startswith("text/event-stream")
    assert up.requests[-1].body == packed
    assert up.requests[-1].json()["model"] == "m1"


def test_memory_of_requests_is_bounded_as_told() -> None:
    with Upstream(keep=0, tls=False) as up:
        for _ in range(3):
            PLAIN.post(up.http_url + PATHS["openai"], json=ASK)
        assert (up.requests, up.count) == ([], 3)


def test_waiting_ends_with_what_came_or_with_an_error(up: Upstream) -> None:
    sock = request(up.http_port, PATHS["openai"], ASK)
    assert up.wait_for(lambda u: u.count == 1)[0].model == "m1"
    sock.close()
    with pytest.raises(TimeoutError):
        up.wait_for(lambda u: u.count == 2, timeout_s=0.01)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nowhere", b"", 404),
        ("HEAD", "/", b"", 404),
        ("GET", "/v1/chat/completions", b"", 405),
        ("POST", "/v1/messages", b'{"model": ', 400),
        ("POST", "/v1/chat/completions", b"[1]", 400),
        ("POST", "/v1/chat/completions", b"{}", 400),
        ("POST", "/v1/chat/completions", b'{"model":"m","messages":["\\ud800"],"x":NaN}', 200),
    ],
)
def test_requests_that_make_no_sense_get_an_error(
    up: Upstream, method: str, path: str, body: bytes, status: int
) -> None:
    got = PLAIN.request(method, up.http_url + path, content=body)
    assert got.status_code == status
    assert method == "HEAD" or status == 200 or got.json()["error"]["message"]


def test_a_websocket_upgrade_is_refused_with_426(up: Upstream) -> None:
    headers = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
    wire = read(request(up.http_port, "/v1/responses", None, *headers))
    assert wire.head.startswith("HTTP/1.1 426 ")


# The providers' quirks

SPENT = TokenUsage(input=100, output=20, cached=40, reasoning=4)


def quirky(up: Upstream, host: str, *, asked: bool = False) -> list[dict[str, Any]]:
    up.default = Reply(text="Hello there, friend", reasoning="Thinking.", usage=SPENT)
    body = {**ASK, "stream": True}
    if asked:
        body["stream_options"] = {"include_usage": True}
    got = post(up, host, PATHS["openai"], body)
    assert got.status_code == 200, got.text
    return data(got.content)


def test_moonshot_puts_usage_into_the_finish_choice(up: Upstream) -> None:
    for asked in (False, True):
        chunks = quirky(up, "api.moonshot.ai", asked=asked)
        assert not any("usage" in c for c in chunks)
        assert chunks[-1]["choices"][0]["usage"]["cached_tokens"] == 40
    plain = post(up, "api.moonshot.cn", PATHS["openai"], ASK).json()
    assert plain["usage"]["cached_tokens"] == 40


@pytest.mark.parametrize("host", ["integrate.api.nvidia.com", "api.siliconflow.cn"])
def test_some_providers_send_the_usage_so_far_on_every_chunk(up: Upstream, host: str) -> None:
    counts = [c["usage"]["completion_tokens"] for c in quirky(up, host)]
    assert counts == sorted(counts)
    assert counts[-1] == 20
    assert len(set(counts)) > 2


def test_groq_hides_usage_in_x_groq(up: Upstream) -> None:
    chunks = quirky(up, "api.groq.com")
    assert chunks[0]["x_groq"]["id"]
    assert chunks[-1]["x_groq"]["usage"]["prompt_tokens"] == 100
    assert not any("usage" in c for c in chunks)
    assert quirky(up, "api.groq.com", asked=True)[-1]["usage"]["total_tokens"] == 120
    assert any("reasoning" in c["choices"][0]["delta"] for c in chunks)


def test_openrouter_comments_and_tells_the_cost(up: Upstream) -> None:
    chunks = quirky(up, "openrouter.ai")
    assert chunks[-1]["usage"]["cost"] > 0
    up.default = Reply(stream_error="Provider broke")
    got = post(up, "openrouter.ai", "/api/v1/chat/completions", {**ASK, "stream": True})
    assert got.text.startswith(": OPENROUTER PROCESSING\n\n")
    assert "x-generation-id" in got.headers
    last = data(got.content)[-1]
    assert last["choices"][0]["finish_reason"] == "error"


def test_cerebras_sends_usage_and_times_unasked(up: Upstream) -> None:
    last = quirky(up, "api.cerebras.ai")[-1]
    assert last["usage"]["prompt_tokens"] == 100
    assert last["time_info"]["total_time"] > 0


def test_gemini_counts_hidden_thinking_only_in_the_total(up: Upstream) -> None:
    last = quirky(up, "generativelanguage.googleapis.com", asked=True)[-1]
    assert last["usage"] == {
        "prompt_tokens": 100,
        "completion_tokens": 16,
        "total_tokens": 120,
    }


def test_mistral_sends_usage_unasked_and_refuses_what_it_does_not_know(up: Upstream) -> None:
    chunks = quirky(up, "api.mistral.ai")
    assert chunks[-1]["usage"]["total_tokens"] == 120
    assert chunks[1]["choices"][0]["delta"]["content"][0]["type"] == "thinking"
    body = {**ASK, "stream": True, "stream_options": {}, "max_completion_tokens": 9}
    got = post(up, "api.mistral.ai", PATHS["openai"], body)
    assert got.status_code == 422
    wrong = [e["loc"][1] for e in got.json()["message"]["detail"]]
    assert wrong == ["stream_options", "max_completion_tokens"]
    history = [{"role": "tool", "tool_call_id": "functions.read:0", "content": ""}]
    got = post(up, "api.mistral.ai", PATHS["openai"], {**ASK, "messages": history})
    assert got.status_code == 400
    assert "length of 9" in got.json()["message"]


def test_kimi_code_tells_context_lengths(up: Upstream) -> None:
    got = PLAIN.get(up.http_url + "/coding/v1/models", headers={"host": "api.kimi.com"})
    assert {m["context_length"] for m in got.json()["data"]} == {262_144}


# Made-up conversations


@dialects
@pytest.mark.parametrize("size", [20_000, 200_000])
def test_a_conversation_grows_to_its_size_and_keeps_its_beginning(dialect: Any, size: int) -> None:
    bodies = list(conversation(30, size, dialect))
    assert len(bodies) == 30
    sent = [json.dumps(b, separators=(",", ":")) for b in bodies]
    assert abs(len(sent[-1]) - size) < size * 0.2
    key = next(k for k in ("messages", "input", "contents") if k in bodies[0])
    for earlier, later in itertools.pairwise(bodies):
        assert later[key][: len(earlier[key])] == earlier[key]
        assert len(later[key]) > len(earlier[key])
    assert [json.dumps(b, separators=(",", ":")) for b in conversation(30, size, dialect)] == sent
    assert list(conversation(30, size, dialect, seed=1)) != bodies


def test_the_model_answers_what_the_next_turn_repeats(up: Upstream) -> None:
    bodies = list(conversation(5, 20_000, stream=False, model="codestral"))
    replies = list(conversation_replies(5, 20_000))
    for body, reply, after in zip(bodies, replies, bodies[1:], strict=False):
        up.default = reply
        got = post(up, "api.mistral.ai", PATHS["openai"], body)
        said = got.json()["choices"][0]["message"]
        repeated = after["messages"][len(body["messages"])]
        assert said["content"] == repeated["content"]
        assert said["tool_calls"] == repeated["tool_calls"]


# As a process, and behind a real mitmproxy


def test_it_runs_as_a_process_of_its_own(tmp_path: Path) -> None:
    folder = Path(__file__).with_name("upstream")
    command = [sys.executable, str(folder), "--port", "0", "--tls", "--size", "5", "--with-stdin"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin
        assert process.stdout
        said = json.loads(process.stdout.readline())
        assert said["pid"] == process.pid
        context = ssl.create_default_context(cafile=said["ca_file"])
        url = f"https://localhost:{said['https_port']}/v1/chat/completions"
        got = httpx.post(url, json=ASK, verify=context).json()
        assert got["choices"][0]["message"]["content"] == filler(5)
        process.stdin.close()
        assert process.wait(5) == 0
    assert not Path(said["ca_file"]).exists()


@dataclass
class Proxy:
    port: int
    ca: Path


@pytest.fixture(scope="module")
def proxy(server: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    confdir = tmp_path_factory.mktemp("confdir")
    script = confdir / "resolve.py"
    # What an addon sees of a mapped name, given back in a header.
    script.write_text(
        "import asyncio, socket\n"
        "async def request(flow):\n"
        "    loop = asyncio.get_running_loop()\n"
        "    info = await loop.getaddrinfo(flow.request.host, flow.request.port)\n"
        "    assert socket.getaddrinfo(flow.request.host, flow.request.port)\n"
        "    flow.metadata['saw'] = f'{flow.request.pretty_host} {info[0][4][0]}'\n"
        "def response(flow):\n"
        "    flow.response.headers['x-saw'] = flow.metadata['saw']\n"
        "def running():\n"
        "    from mitmproxy import ctx\n"
        "    server = ctx.master.addons.get('proxyserver')\n"
        "    print('port', server.listen_addrs()[0][1], flush=True)\n"
    )
    options = {
        "confdir": confdir,
        "connection_strategy": "lazy",
        "ssl_verify_upstream_trusted_ca": server.ca_file,
    }
    command = [str(Path(sys.executable).with_name("mitmdump")), "-q", "--listen-port", "0"]
    command += ["--listen-host", "127.0.0.1", "-s", str(script)]
    for name, value in options.items():
        command += ["--set", f"{name}={value}"]
    environment = {**os.environ, **server.environment()}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()
        yield Proxy(int(line.removeprefix("port ")), confdir / "mitmproxy-ca-cert.pem")
        process.terminate()


@pytest.mark.parametrize("http2", [False, True])
@pytest.mark.parametrize("host", ["api.mistral.ai", "generativelanguage.googleapis.com"])
def test_mitmdump_reaches_it_by_the_providers_name(
    up: Upstream, proxy: Proxy, host: str, http2: bool
) -> None:
    up.default = Reply(text="through the proxy")
    with httpx.Client(
        proxy=f"http://127.0.0.1:{proxy.port}",
        verify=ssl.create_default_context(cafile=str(proxy.ca)),
        http2=http2,
    ) as client:
        got = client.post(f"https://{host}/v1/chat/completions", json=ASK)
    assert got.json()["choices"][0]["message"]["content"] == "through the proxy"
    last = up.requests[-1]
    assert (last.host, last.sni, last.scheme) == (host, host, "https")
    assert last.http_version == ("HTTP/2.0" if http2 else "HTTP/1.1")
    name, address = got.headers["x-saw"].split()
    assert name == host
    assert address.startswith("198.18.")


def test_mitmdump_resolves_no_other_name(proxy: Proxy) -> None:
    with httpx.Client(proxy=f"http://127.0.0.1:{proxy.port}") as client:
        got = client.get("http://example.org/")
    assert got.status_code == 502


CHILD: dict[str, Callable[[], str]] = {
    "asyncio": lambda: (
        "import asyncio, ssl, sys\n"
        "async def main():\n"
        "    context = ssl.create_default_context(cafile=sys.argv[1])\n"
        "    r, w = await asyncio.open_connection('api.openai.com', 443, ssl=context)\n"
        "    w.write(b'GET /v1/models HTTP/1.1\\r\\nHost: api.openai.com\\r\\n\\r\\n')\n"
        "    assert b' 200 ' in await r.readline()\n"
        "asyncio.run(main())\n"
    ),
    "httpx": lambda: (
        "import asyncio, httpx, ssl, sys\n"
        "context = ssl.create_default_context(cafile=sys.argv[1])\n"
        "url = 'https://api.openai.com/v1/models'\n"
        "assert httpx.get(url, verify=context).status_code == 200\n"
        "async def main():\n"
        "    async with httpx.AsyncClient(verify=context) as client:\n"
        "        assert (await client.get(url)).status_code == 200\n"
        "asyncio.run(main())\n"
    ),
}


@pytest.mark.parametrize("client", CHILD)
def test_a_child_process_finds_it_by_name(up: Upstream, client: str) -> None:
    command = [sys.executable, "-c", CHILD[client](), str(up.ca_file)]
    environment = {**os.environ, **up.environment()}
    subprocess.run(command, env=environment, check=True, timeout=20)
    assert up.requests[-1].sni == "api.openai.com"
