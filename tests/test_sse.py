import json
import time
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_core.sse import SSE, Event, Framing, JSONArray


def read(framing: Framing, pieces: Iterable[bytes]) -> list[Event]:
    events = [event for piece in pieces for event in framing.feed(piece)]
    return events + framing.end()


def whole(framing: Callable[[], Framing], stream: bytes) -> list[Event]:
    return read(framing(), [stream])


def bytewise(framing: Callable[[], Framing], stream: bytes) -> list[Event]:
    return read(framing(), (stream[at : at + 1] for at in range(len(stream))))


def payloads(events: list[Event]) -> list[tuple[str, bytes]]:
    return [(event.type, event.data) for event in events if event.data]


# --- event streams -----------------------------------------------------------------------

STREAMS: dict[str, tuple[bytes, list[tuple[str, bytes]]]] = {
    "openai": (
        b'data: {"a":1}\n\ndata: {"a":2}\n\ndata: [DONE]\n\n',
        [("", b'{"a":1}'), ("", b'{"a":2}'), ("", b"[DONE]")],
    ),
    "anthropic": (
        b'event: message_start\ndata: {"type":"message_start"}\n\n'
        b'event: ping\ndata: {"type": "ping"}\n\n',
        [("message_start", b'{"type":"message_start"}'), ("ping", b'{"type": "ping"}')],
    ),
    "gemini": (
        b'data: {"a": 1}\r\n\r\ndata: {"b": 2}\r\n\r\n',
        [("", b'{"a": 1}'), ("", b'{"b": 2}')],
    ),
    "old mac": (b"data: 1\r\rdata: 2\r\r", [("", b"1"), ("", b"2")]),
    "mixed line ends": (
        b"data: 1\r\n\ndata: 2\n\r\ndata: 3\r\r\ndata: 4\n\rdata: 5\r\n\rdata: 6\r\n\r\n",
        [("", str(n).encode()) for n in range(1, 7)],
    ),
    "keep-alives": (
        b": OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\ndata: 1\n\n:\n\ndata: 2\n:x\n\n",
        [("", b"1"), ("", b"2")],
    ),
    # The examples of the specification, section 9.2.6.
    "several data lines": (
        b"data: YHOO\ndata: +2\ndata: 10\n\n",
        [("", b"YHOO\n+2\n10")],
    ),
    "comment, id and space": (
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\n"
        b"data:  third event\n\n",
        [("", b"first event"), ("", b"second event"), ("", b" third event")],
    ),
    "empty data": (b"data\n\ndata\ndata\n\ndata:", [("", b"\n")]),
    "space after the colon": (b"data:test\n\ndata: test\n\n", [("", b"test"), ("", b"test")]),
    "unknown fields": (
        b"retry: 10\nfoo: bar\ndatax: 1\n data: 2\nDATA: 3\ndata : 4\ndata: 5\n\n",
        [("", b"5")],
    ),
    "colons in the value": (b"event: a:b\ndata: c:d: e\n\n", [("a:b", b"c:d: e")]),
    "the last event type counts": (b"event: a\nevent: b\ndata: 1\n\n", [("b", b"1")]),
    "a byte order mark": (
        b"\xef\xbb\xbfdata: 1\n\n\xef\xbb\xbfdata: 2\n\ndata: 3\n\n",
        [("", b"1"), ("", b"3")],
    ),
    "no last blank line": (b"data: 1\n\ndata: 2\n", [("", b"1"), ("", b"2")]),
    "no last line end": (b"data: 1\n\nevent: x\ndata: 2", [("", b"1"), ("x", b"2")]),
    "one letter in a last line": (b"data: x\ny", [("", b"x")]),
    "blank lines before and between": (
        b"\n\n\r\n\n\ndata: 1\n\n\n\n\ndata: 2\n\n\n",
        [("", b"1"), ("", b"2")],
    ),
    "utf-8": ('event: é\ndata: {"t":"日本 😀"}\n\n'.encode(), [("é", '{"t":"日本 😀"}'.encode())]),
    "bad utf-8": (b"event: \xff\ndata: \xff\n\n", [("\ufffd", b"\xff")]),
    "nul": (b"data: a\x00b\n\n", [("", b"a\x00b")]),
    "nothing": (b"", []),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_gives_its_events_however_it_is_cut(name: str) -> None:
    stream, expected = STREAMS[name]
    events = whole(SSE, stream)
    assert payloads(events) == expected
    assert b"".join(event.raw for event in events) == stream
    assert bytewise(SSE, stream) == events
    for size in range(2, 9):
        pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert read(SSE(), pieces) == events
    for at in range(len(stream)):
        assert read(SSE(), [stream[:at], b"", stream[at:]]) == events


@given(
    st.lists(
        st.sampled_from(
            [
                b"\r",
                b"\n",
                b"\r\n",
                b"\n\n",
                b"data: ",
                b"data:x",
                b"event: t",
                b":",
                b"\xef\xbb\xbf",
                b"\xc3\xa9",
                b" ",
            ]
        )
    ).map(b"".join),
    st.lists(st.integers(1, 7), min_size=1),
)
@settings(max_examples=100, deadline=None)
def test_any_stream_cut_anywhere_gives_the_same_events(stream: bytes, sizes: list[int]) -> None:
    events = whole(SSE, stream)
    assert b"".join(event.raw for event in events) == stream
    assert bytewise(SSE, stream) == events
    assert read(SSE(), cut(stream, sizes)) == events
    assert payloads(events) == reference(stream)


def cut(stream: bytes, sizes: list[int]) -> list[bytes]:
    pieces: list[bytes] = []
    at = 0
    while at < len(stream):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream[at : at + size])
        at += size
    return pieces


def reference(stream: bytes) -> list[tuple[str, bytes]]:
    """Read a whole stream by the letter of the specification, but for the unfinished end."""
    text = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    found: list[tuple[str, bytes]] = []
    type_, data = "", []
    for line in [*text.split(b"\n"), b""]:
        if not line:
            if b"\n".join(data):
                found.append((type_, b"\n".join(data)))
            type_, data = "", []
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            data.append(value)
        elif name == b"event":
            type_ = value.decode()
    return found


def test_an_event_is_given_as_soon_as_its_blank_line_is_there() -> None:
    sse = SSE()
    assert sse.feed(b"data: 1\n") == []
    assert payloads(sse.feed(b"\n")) == [("", b"1")]
    assert sse.feed(b"data: 2\r\n\r") == []  # \n follows
    assert payloads(sse.feed(b"\n")) == [("", b"2")]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_huge_event_in_small_pieces_takes_linear_time(size: int, end: bytes) -> None:
    payload = b'{"x":"' + b"a" * 300_000 + b'"}'
    stream = b": hello" + end * 2 + b"data: " + payload + end * 2
    before = time.process_time()
    events = read(SSE(), (stream[at : at + size] for at in range(0, len(stream), size)))
    # Quadratic, one byte at a time, it takes minutes.
    assert time.process_time() - before < 5
    assert payloads(events) == [("", payload)]


def test_many_events_in_one_piece_take_linear_time() -> None:
    stream = b'data: {"delta":"word"}\n\n' * 100_000
    before = time.process_time()
    assert len(whole(SSE, stream)) == 100_000
    assert time.process_time() - before < 3


@pytest.mark.parametrize("size", [1, 3, 10, 1000])
def test_an_event_that_is_too_large_passes_in_pieces_unread(size: int) -> None:
    stream = b"data: 1\n\ndata: " + b"x" * 500 + b"\n\ndata: 2\n\n"
    sse = SSE(max_bytes=100)
    events: list[Event] = []
    for at in range(0, len(stream), size):
        events += sse.feed(stream[at : at + size])
        waiting = at + size - sum(len(event.raw) for event in events)
        assert waiting <= 100 + size
    events += sse.end()
    assert payloads(events) == [("", b"1"), ("", b"2")]
    assert b"".join(event.raw for event in events) == stream


def test_an_encoded_event_is_read_back() -> None:
    assert SSE().encode(b'{"a":1}') == b'data: {"a":1}\n\n'
    assert SSE().encode(b"{}", "ping") == b"event: ping\ndata: {}\n\n"
    for data in (b"one", b"two\nlines", b"", b"\n", b"a\rb\r\nc"):
        again = whole(SSE, SSE().encode(data, "t"))
        assert [(event.type, event.data) for event in again] == [
            ("t", data.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
        ]


# --- JSON arrays -----------------------------------------------------------------------------

ARRAYS: dict[str, tuple[bytes, list[bytes]]] = {
    "gemini": (
        b'[{\n  "candidates": [{"content": {"parts": [{"text": "a"}]}}]\n}\n,\r\n{"b": 2}\n]\n',
        [b'{\n  "candidates": [{"content": {"parts": [{"text": "a"}]}}]\n}', b'{"b": 2}'],
    ),
    "brackets in strings": (
        b'[{"a":"}]\\"}{["},{"\\\\":"\\\\\\"]"},{"c":"\\\\"}]',
        [b'{"a":"}]\\"}{["}', b'{"\\\\":"\\\\\\"]"}', b'{"c":"\\\\"}'],
    ),
    "an error": (b'[{"error":{"code":429}}]', [b'{"error":{"code":429}}']),
    "elements that are no objects": (b'[1,"[{",[2],null,{}]', [b"[2]", b"{}"]),
    "one object": (b' {"error":{"code":400},"a":[{}]} ', [b'{"error":{"code":400},"a":[{}]}']),
    "empty": (b"[]", []),
    "nothing": (b"", []),
    "white space": (b" \n", []),
    "cut": (b'[{"a":1},\n{"b":"x', [b'{"a":1}', b'{"b":"x']),
    "cut in an escape": (b'[{"b":"\\', [b'{"b":"\\']),
    "no json": (b"]]}}[{{", [b"[{{"]),
    "utf-8": ('[{"é":"日本"}]'.encode(), ['{"é":"日本"}'.encode()]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_gives_its_elements_however_it_is_cut(name: str) -> None:
    stream, expected = ARRAYS[name]
    events = whole(JSONArray, stream)
    if name != "no json":  # there only the bytes count
        assert [event.data for event in events if event.data] == expected
    assert b"".join(event.raw for event in events) == stream
    for at in range(len(stream) + 1):
        assert read(JSONArray(), [stream[:at], b"", stream[at:]]) == events
    assert bytewise(JSONArray, stream) == events


@given(st.binary(max_size=40) | st.text('[]{}",\\a \n', max_size=40).map(str.encode), st.data())
@settings(max_examples=100, deadline=None)
def test_any_bytes_pass_through_an_array_unchanged(stream: bytes, data: st.DataObject) -> None:
    events = whole(JSONArray, stream)
    assert b"".join(event.raw for event in events) == stream
    assert bytewise(JSONArray, stream) == events
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=1))
    assert read(JSONArray(), cut(stream, sizes)) == events


@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=3),
            st.text('[]{}",\\é\n', max_size=6) | st.lists(st.just({"a": []}), max_size=2),
            max_size=3,
        ),
        max_size=4,
    ),
    st.sampled_from([None, 1]),
    st.lists(st.integers(1, 30), min_size=1),
)
@settings(max_examples=40, deadline=None)
def test_any_array_of_objects_gives_them_back(
    objects: list[object], indent: int | None, sizes: list[int]
) -> None:
    stream = json.dumps(objects, indent=indent, ensure_ascii=False).encode()
    events = read(JSONArray(), cut(stream, sizes))
    assert [json.loads(event.data) for event in events if event.data] == objects
    assert b"".join(event.raw for event in events) == stream


def test_an_element_is_given_as_soon_as_it_is_complete() -> None:
    array = JSONArray()
    assert array.feed(b'[{"a":{}') == []
    assert [event.data for event in array.feed(b"}")] == [b'{"a":{}}']


@pytest.mark.parametrize("size", [1, 7, 64, 16_384])
@pytest.mark.parametrize("filling", [b"a", b"\\n", b'\\"', b"[]"])
def test_a_huge_element_in_small_pieces_takes_linear_time(size: int, filling: bytes) -> None:
    element = b'{"data":"' + filling * (200_000 // len(filling)) + b'"}'
    stream = b"[" + element + b"]"
    before = time.process_time()
    events = read(JSONArray(), (stream[at : at + size] for at in range(0, len(stream), size)))
    assert time.process_time() - before < 5
    assert events[0].data == element


@pytest.mark.parametrize("size", [1, 3, 10, 1000])
def test_an_element_that_is_too_large_passes_in_pieces_unread(size: int) -> None:
    stream = b'[{"a":1},{"b":"' + b"x]}" * 200 + b'"},{"c":2}]'
    array = JSONArray(max_bytes=100)
    events: list[Event] = []
    for at in range(0, len(stream), size):
        events += array.feed(stream[at : at + size])
        assert at + size - sum(len(event.raw) for event in events) <= 100 + size
    events += array.end()
    assert [event.data for event in events if event.data] == [b'{"a":1}', b'{"c":2}']
    assert b"".join(event.raw for event in events) == stream
