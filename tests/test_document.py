import gc
import json
import math
import sys
import threading
import time
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kimi_core.document import (
    Document,
    NotJSON,
    Path,
    Shape,
    decode,
    encode,
    locate,
    splice,
    splice_all,
)

SHAPE = Shape("model", "stream", "tools", "metadata", arrays=("messages",))

# Everything that a re-encoding would change, once.
ODD = (
    b' {\r\n\t"model" : "\\u006bimi" ,"unknown":{"b":1.0e2,"a":-0,"b":1E+2},'
    b'"big":123456789012345678901234567890,"messages":[ {"role":"user","content":"a\\/b\\u00e9"} ,'
    b'{"content":[{"type":"text","text":"\xc3\xa9"}],"role":"user"}],\n"z":[],"e":{} ,"z":null}  \n'
)


def document(body: bytes) -> Document:
    return Document(body, SHAPE)


# --- bytes stay ------------------------------------------------------------------------


def test_an_untouched_body_is_the_very_object_that_came() -> None:
    assert document(ODD).encode() is ODD
    assert not document(ODD).edited


@pytest.mark.parametrize(
    ("path", "value", "old", "new"),
    [
        (("model",), "m", b'"\\u006bimi"', b'"m"'),
        (("messages", 0, "content"), "x\ny", b'"a\\/b\\u00e9"', b'"x\\ny"'),
        (("messages", 1, "content", 0, "text"), "é", b'"\xc3\xa9"', b'"\xc3\xa9"'),
        (("unknown", "b"), 7, b"1E+2", b"7"),  # of two equal keys the last is the one that counts
        (("z",), [1], b"null", b"[1]"),
        (("big",), None, b"123456789012345678901234567890", b"null"),
    ],
)
def test_an_edit_changes_no_other_byte(path: Path, value: Any, old: bytes, new: bytes) -> None:
    edited = document(ODD)
    edited.set(path, value)
    before, _, after = ODD.rpartition(old) if path == ("z",) else ODD.partition(old)
    assert edited.encode() == before + new + after
    assert edited.edited
    assert edited.body is ODD


@pytest.mark.parametrize(
    "body",
    [
        b'{"x":NaN,"model":"a"}',
        b'{"x":-Infinity,"model":"a"}',
        b'{"x":"\\ud800","model":"a"}',
        b'{"\\ud83d":0,"model":"a"}',
        b'{"messages":"no list","model":"a"}',
        b'\xef\xbb\xbf {"model":"a"}',
        b'{"x":"\xff\xfe","model":"a"}',
        b'{"x":"\xed\xa0\x80","model":"a"}',
        b'{"x":1e999,"model":"a"}',
        b'{"x":' + b"7" * 5000 + b',"model":"a"}',
    ],
)
def test_what_a_strict_decoder_refuses_keeps_its_bytes_beside_an_edit(body: bytes) -> None:
    odd = document(body)
    assert odd.encode() is body
    assert odd.get("model") == "a"
    odd.set(("model",), "b")
    odd.set(("new",), [])
    brace = body.index(b"{") + 1
    assert odd.encode() == body[:brace] + b'"new":[],' + body[brace:].replace(
        b'"model":"a"', b'"model":"b"'
    )


# --- reading ---------------------------------------------------------------------------


def test_values_are_read_by_key_whether_the_shape_names_them_or_not() -> None:
    found = document(ODD)
    assert found.get("model") == "kimi"
    assert found.raw("big") == b"123456789012345678901234567890"
    assert found.get("big") == 123456789012345678901234567890
    assert found.raw("unknown") == b'{"b":1.0e2,"a":-0,"b":1E+2}'
    assert found.has("z")
    assert found.raw("z") == b"null"
    assert found.get("z", "default") == "default"
    assert not found.has("stream")
    assert found.get("stream") is None
    assert found.get("stream", False) is False
    assert found.raw("messages").startswith(b'[ {"role"')
    assert found.raw("messages").endswith(b'"role":"user"}]')
    assert [bytes(element) for element in found.elements("messages")] == [
        b'{"role":"user","content":"a\\/b\\u00e9"}',
        b'{"content":[{"type":"text","text":"\xc3\xa9"}],"role":"user"}',
    ]


def test_a_key_is_found_however_it_is_escaped() -> None:
    for tail in (b"", b',"nan":NaN'):
        found = document(b'{"mod\\u0065l":"a","\\u006Dessages":[1]' + tail + b"}")
        assert found.get("model") == "a"
        assert [bytes(one) for one in found.elements("messages")] == [b"1"]
        found.set(("model",), "b")
        assert found.encode() == (b'{"mod\\u0065l":"b","\\u006Dessages":[1]' + tail + b"}")


@pytest.mark.parametrize(
    "body", [b"{}", b'{"messages":null}', b'{"messages":[]}', b'{"messages":{"a":1}}']
)
def test_a_list_that_is_empty_or_none_has_no_elements(body: bytes) -> None:
    for one in (body, body[:-1] + (b"," if len(body) > 2 else b"") + b'"nan":NaN}'):
        found = document(one)
        assert found.elements("messages") == []
        assert found.raw("messages") == body[12:-1]
        assert found.has("messages") == (len(body) > 2)
        assert found.locate(("messages", 0)) is None
        assert found.locate(("messages", -1)) is None


def test_elements_of_a_list_that_the_shape_does_not_name_are_found() -> None:
    for tail in (b"", b',"nan":NaN'):
        found = document(b'{"input":[ {"a":"]"} , [1,[2]],"x" , 3 ]' + tail + b"}")
        assert [bytes(one) for one in found.elements("input")] == [
            b'{"a":"]"}',
            b"[1,[2]]",
            b'"x"',
            b"3",
        ]


# --- editing ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "added"),
    [
        (b"{}", b'{"new":1}'),
        (b"{ }", b'{"new":1 }'),
        (b'{ "a":{}}', b'{"new":1, "a":{}}'),
        (b' {"a":"{"}', b' {"new":1,"a":"{"}'),
    ],
)
def test_a_missing_key_is_added(body: bytes, added: bytes) -> None:
    found = document(body)
    found.set(("new",), 1)
    assert found.encode() == added
    assert found.get("new") == 1


def test_several_missing_keys_are_added_to_the_same_object() -> None:
    found = document(b'{"a":{}}')
    found.set(("b",), 1)
    found.set(("a", "x"), 2)
    found.set(("c",), 3)
    found.set(("a", "y"), 4)
    assert found.encode() == b'{"b":1,"c":3,"a":{"x":2,"y":4}}'
    assert found.get("a") == {"x": 2, "y": 4}


def test_a_missing_key_of_a_message_is_added() -> None:
    found = document(b'{"messages":[{},{"role":"user"}]}')
    found.set(("messages", 1, "name"), "n")
    found.set(("messages", 0, "role"), "user")
    assert found.encode() == b'{"messages":[{"role":"user"},{"name":"n","role":"user"}]}'
    assert [decode(one) for one in found.elements("messages")] == [
        {"role": "user"},
        {"name": "n", "role": "user"},
    ]


def test_what_is_read_after_an_edit_is_what_leaves() -> None:
    found = document(b'{"model":"a","messages":[{"role":"user","content":"long"}],"x":1}')
    assert found.get("model") == "a"
    found.set(("model",), "b")
    found.set(("messages", 0, "content"), "short")
    assert found.get("model") == "b"
    assert found.raw("model") == b'"b"'
    assert found.raw("messages") == b'[{"role":"user","content":"short"}]'
    assert [bytes(one) for one in found.elements("messages")] == [
        b'{"role":"user","content":"short"}'
    ]
    assert found.encode() == (b'{"model":"b","messages":[{"role":"user","content":"short"}],"x":1}')


def test_edits_of_several_editors_to_one_message_all_arrive() -> None:
    found = document(b'{"messages":[{"content":[{"text":"a"},{"text":"b"}]},{"content":"c"}]}')
    found.set(("messages", 0, "content", 0, "text"), "A")
    found.set(("messages", 0, "content", 1, "text"), "B")
    assert found.encode() == (
        b'{"messages":[{"content":[{"text":"A"},{"text":"B"}]},{"content":"c"}]}'
    )
    found.set(("messages", 0, "content"), [{"text": "whole"}])
    found.set(("messages", 0, "content", 0, "text"), "inner")
    found.set(("messages", 0, "content", 0, "cache_control"), {})
    assert found.encode() == (
        b'{"messages":[{"content":[{"cache_control":{},"text":"inner"}]},{"content":"c"}]}'
    )


def test_after_a_list_is_replaced_paths_lead_into_the_new_one() -> None:
    found = document(b'{"messages":[1,2,3]}')
    found.set(("messages",), [{"content": "summary"}, {"content": "last"}])
    found.set(("messages", 1, "content"), "cut")
    assert found.get("messages") == [{"content": "summary"}, {"content": "cut"}]
    with pytest.raises(KeyError):
        found.set(("messages", 2), 0)
    assert found.encode() == b'{"messages":[{"content":"summary"},{"content":"cut"}]}'


@pytest.mark.parametrize("path", [("messages",), ("tools",), ("z", "deep")])
@pytest.mark.parametrize(
    ("array", "appended"),
    [
        (b"[]", b'[{"n":1.0e2}, "last"]'),
        (b"[ \n]", b'[{"n":1.0e2}, "last" \n]'),
        (b"[1]", b'[1,{"n":1.0e2}, "last"]'),
        (b'[ {"a":[]} , [2] \t]', b'[ {"a":[]} , [2],{"n":1.0e2}, "last" \t]'),
    ],
)
def test_elements_are_added_at_the_end_of_an_array(
    path: Path, array: bytes, appended: bytes
) -> None:
    key = str(path[0])
    if path == ("z", "deep"):
        array, appended = b'{"deep" :' + array + b"}", b'{"deep" :' + appended + b"}"
    for more in (b"1E+2", b"NaN"):  # read by msgspec, and by the exact scanner
        body = b'{"model" : "m","more":%s, "%s": %s }\n' % (more, key.encode(), array)
        found = document(body)
        found.append_raw(path, b'{"n":1.0e2}')
        found.append_raw(path, b' "last"')
        assert found.encode() == appended.join(body.rsplit(array, 1))
        assert found.raw(key) == appended
        assert found.edited


def test_what_was_added_to_an_array_is_read_and_edited_like_the_rest() -> None:
    found = document(b'{"messages":[{"content":"a"},{"content":"b"}]}')
    found.set(("messages", 1, "content"), "B")
    found.append_raw(("messages",), b'{"content":[]}')
    found.set(("messages", 0), "A")
    found.append_raw(("messages",), b'{"content":"d"}')
    found.append_raw(("messages", 2, "content"), b"1")
    found.set(("messages", 3, "content"), "D")
    left = b'["A",{"content":"B"},{"content":[1]},{"content":"D"}]'
    assert found.raw("messages") == left
    assert [bytes(one) for one in found.elements("messages")] == [
        b'"A"',
        b'{"content":"B"}',
        b'{"content":[1]}',
        b'{"content":"D"}',
    ]
    assert found.get("messages") == json.loads(left)
    assert found.encode() == b'{"messages":' + left + b"}"
    with pytest.raises(KeyError):
        found.set(("messages", 4), 0)
    found.set(("messages",), [])
    found.append_raw(("messages",), b"0")
    assert found.encode() == b'{"messages":[0]}'


@pytest.mark.parametrize(
    "path", [("missing",), ("model",), ("messages",), ("tools", 0), ("tools", 1), ("x", "y")]
)
def test_nothing_is_added_where_no_array_stands(path: Path) -> None:
    body = b'{"model":"m","messages":null,"tools":[{}],"x":{}}'
    found = document(body)
    with pytest.raises(KeyError):
        found.append_raw(path, b"1")
    assert found.encode() is body
    found.set(("model",), {"held": 1})
    with pytest.raises(KeyError):
        found.append_raw(("model", "held"), b"1")
    assert found.get("model") == {"held": 1}


@pytest.mark.parametrize(
    "path",
    [
        ("messages", 5),
        ("messages", -1),
        ("messages", 0, "content", 0),
        ("messages", 0, "content", "text"),
        ("missing", "key"),
        ("model", "key"),
        ("messages", "role"),
        (0,),
    ],
)
def test_a_path_that_leads_nowhere_is_refused_at_once_and_changes_nothing(path: Path) -> None:
    for tail in (b"", b',"nan":NaN'):
        body = b'{"model":"m","messages":[{"content":"c"}]' + tail + b"}"
        found = document(body)
        with pytest.raises(KeyError):
            found.set(path, 1)
        assert found.encode() is body


def test_json_text_is_put_in_as_it_is() -> None:
    found = document(b'{"model":"m"}')
    found.set_raw(("model",), b" 1.0e2 ")
    assert found.encode() == b'{"model": 1.0e2 }'


def test_a_splice_into_json_text_changes_only_its_value() -> None:
    text = b'{"a":[ 1.0e2, {"b":"x"}]}'
    assert splice(text, ("a", 1, "b"), "y") == b'{"a":[ 1.0e2, {"b":"y"}]}'
    assert splice(text, ("a", 1, "c"), None) == b'{"a":[ 1.0e2, {"c":null,"b":"x"}]}'
    assert splice(text, (), 1) == b"1"
    with pytest.raises(KeyError):
        splice(text, ("a", 2), 0)


# --- what is no JSON object --------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"1",
        b'"{}"',
        b"[]",
        b"[{}]",
        b"NaN",
        b"{",
        b"}",
        b'{"a"}',
        b'{"a":}',
        b'{"a":1,}',
        b'{"a":1]',
        b'{"a":[}]}',
        b"{'a':1}",
        b"{a:1}",
        b'{"a":01}',
        b'{"a":1.}',
        b'{"a":"\n"}',
        b'{"a":"\\x"}',
        b'{"a":"\\u12"}',
        b'{"a":1}{}',
        b'{"a":1} x',
        b'{"a":1}\x00',
        b"\xff\xfe{\x00}\x00",
        b"\x1f\x8b\x08\x00",
        b"--boundary\r\n",
    ],
)
def test_what_is_no_object_is_not_json(body: bytes) -> None:
    with pytest.raises(NotJSON):
        document(body)


def test_a_body_cut_at_any_byte_is_not_json() -> None:
    for body in (ODD.strip(), b'{"nan":NaN,"messages":[{"content":"\\ud800 \xc3\xa9"}],"x":"y"}'):
        document(body)
        for size in range(len(body)):
            with pytest.raises(NotJSON):
                document(body[:size])


@pytest.mark.parametrize(
    "nested",
    [
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages":[' + b"[" * 100_000 + b"]" * 100_000 + b"]}",
        b'{"other":' + b"[{" * 100_000,
    ],
)
def test_deep_nesting_is_refused_and_crashes_nothing(nested: bytes) -> None:
    results: list[bool] = []

    def read() -> None:
        with pytest.raises(NotJSON):
            document(nested)
        with pytest.raises(NotJSON):
            decode(nested)
        results.append(True)

    read()
    thread = threading.Thread(target=read)  # a thread's stack is smaller than the main one
    thread.start()
    thread.join()
    assert len(results) == 2


def test_nesting_of_any_depth_is_read_or_refused() -> None:
    for depth in [*range(1, 300, 37), *range(400, 1300, 23), *range(1300, 30_000, 1009)]:
        body = b'{"model":"m","metadata":' + b"[" * depth + b"]" * depth + b"}"
        try:
            found = document(body)
        except NotJSON:
            continue
        found.get("metadata")
        found.set(("model",), "n")
        assert found.encode() == body.replace(b'"m"', b'"n"', 1)


def test_a_value_nested_too_deeply_to_be_written_is_not_json() -> None:
    value: Any = []
    for _ in range(200_000):
        value = [value]
    with pytest.raises(NotJSON):
        encode(value)
    while value:  # freed from outside inwards, as deep as it is
        value = value.pop()


# --- values ------------------------------------------------------------------------------


def test_values_are_decoded_as_json_does() -> None:
    assert math.isnan(decode(b"NaN"))
    assert decode(b"1e999") == math.inf
    assert decode(b'"\\ud800"') == "\ud800"
    assert decode(b'"\xed\xa0\x80"') == "\ud800"
    assert decode(b'"\\ud83d\\ude00"') == "😀"
    assert decode(b"9" * 5000) == math.inf
    assert decode(b'{"a":1,"a":2}') == {"a": 2}


@pytest.mark.parametrize("text", [b"", b"nope", b"{", b"[1,]", b'"\n"'])
def test_bad_json_text_is_not_json(text: bytes) -> None:
    with pytest.raises(NotJSON):
        decode(text)


def test_values_are_encoded_compactly_and_always_as_utf_8() -> None:
    assert encode({"a": [1, 2.5, "é", None, True]}) == '{"a":[1,2.5,"é",null,true]}'.encode()
    assert encode("x\ud800y") == b'"x\\ud800y"'
    assert encode(2**80) == b"1208925819614629174706176"
    assert encode({"\udcff": 2**80}) == b'{"\\udcff":1208925819614629174706176}'


# --- any JSON object -----------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=[]), max_size=8),
)
keys = st.one_of(
    st.sampled_from(["model", "messages", "stream", "x", 'q"\\{', ""]), st.text(max_size=3)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def spelled(draw: st.DrawFn, value: Any) -> bytes:
    """Return one of the many spellings of a JSON value."""
    space = draw(st.sampled_from([b"", b" ", b"\n\t", b"\r\n"]))
    if isinstance(value, dict):
        members = [
            space + draw(spelled(key)) + space + b":" + space + draw(spelled(one))
            for key, one in value.items()
        ]
        return b"{" + (space + b",").join(members) + space + b"}"
    if isinstance(value, list):
        return (
            b"[" + (b"," + space).join(space + draw(spelled(one)) for one in value) + space + b"]"
        )
    if isinstance(value, str) and draw(st.booleans()):
        return (
            b'"'
            + "".join(
                f"\\u{unit:04X}"
                for char in value
                for unit in memoryview(char.encode("utf-16-le", "surrogatepass")).cast("H")
            ).encode()
            + b'"'
        )
    if isinstance(value, str):
        try:
            return json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return json.dumps(value).encode()
    return json.dumps(value).encode()


def all_paths(value: Any, path: Path = ()) -> list[Path]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(p for key, one in items for p in all_paths(one, (*path, key)))]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_both_ways_of_reading_agree_with_json_on_any_object(data: st.DataObject) -> None:
    value = data.draw(st.dictionaries(keys, values, max_size=5))
    plain = data.draw(spelled(value))
    # NaN makes msgspec refuse, so that the exact scanner reads the same object.
    odd = plain.rstrip()[:-1] + (b"," if value else b"") + b'"\xc3\xb8nan":NaN}'
    expected = json.loads(plain)  # a spelled pair of surrogates is one character again
    for body in (plain, odd):
        found = document(body)
        assert found.encode() is body
        for key in {*expected, "model", "messages", "stream"}:
            assert found.has(key) == (key in expected)
            assert found.get(key) == expected.get(key)
            assert (decode(found.raw(key)) if found.raw(key) else None) == expected.get(key)
            elements = expected.get(key)
            assert [decode(one) for one in found.elements(key)] == (
                elements if isinstance(elements, list) else []
            )
        for path in all_paths(expected)[1:]:
            span = found.locate(path)
            assert span is not None
            assert json.loads(body[slice(*span)]) == at(expected, path)


def at(value: Any, path: Path) -> Any:
    for step in path:
        value = value[step]
    return value


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_edits_equal_the_same_edits_made_by_json(data: st.DataObject) -> None:
    value = data.draw(st.dictionaries(keys, values, min_size=1, max_size=5))
    plain = data.draw(spelled(value))
    odd = plain.rstrip()[:-1] + b',"\xc3\xb8nan":NaN}'
    for body, extra in ((plain, False), (odd, True)):
        expected = json.loads(body)
        found = document(body)
        for _ in range(data.draw(st.integers(1, 5))):
            path = data.draw(st.sampled_from(all_paths(expected)))
            holder = at(expected, path)
            if isinstance(holder, dict) and (not path or data.draw(st.booleans())):
                path = (*path, data.draw(st.sampled_from(["model", "added", "messages"])))
            assume(path)
            new = data.draw(values)
            if isinstance(holder, list) and data.draw(st.booleans()):
                holder.append(json.loads(json.dumps(new)))
                found.append_raw(path, encode(new))
            else:
                at(expected, path[:-1])[path[-1]] = json.loads(json.dumps(new))
                found.set(path, new)
            key = str(path[0])
            read = [found.get(key)]
            if isinstance(expected[key], list):
                read.append([decode(one) for one in found.elements(key)])
            for there in read:
                assert repr(there) == repr(expected[key]) or there == expected[key]
        left = json.loads(found.encode())
        if extra:
            left.pop("ønan", None)
            expected.pop("ønan", None)
        assert left == expected
        assert found.body is body


@given(st.binary(max_size=60), st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_an_object_or_not_json(noise: bytes, place: int) -> None:
    for body in (noise, ODD[: place % len(ODD)] + noise + ODD[place % len(ODD) :]):
        try:
            found = document(body)
        except NotJSON:
            continue
        found.get("model")
        for key in ("messages", "unknown"):
            found.elements(key)
        found.set(("model",), "m")
        document(found.encode())


# --- size, time, memory ----------------------------------------------------------------------


def large_body(tail: bytes) -> bytes:
    message = b'{"role":"user","content":"' + b'a \\"quoted\\" line\\n' * 40_000 + b'"}'
    return b'{"model":"m","messages":[' + b",".join([message] * 70) + b"]" + tail + b"}"


@pytest.mark.parametrize("tail", [b"", b',"nan":NaN'])
def test_fifty_megabytes_are_read_and_edited_in_time(tail: bytes) -> None:
    body = large_body(tail)
    assert len(body) > 50_000_000
    before = time.process_time()
    found = document(body)
    found.set(("messages", 69, "content"), "short")
    edited = found.encode()
    assert time.process_time() - before < 8
    assert edited.endswith(b'{"role":"user","content":"short"}]' + tail + b"}")
    assert edited.startswith(body[:40_000_000])


def test_a_long_string_without_an_end_is_refused_in_linear_time() -> None:
    text = b'{"a":"' + b'\\"' * 2_000_000
    before = time.process_time()
    with pytest.raises(NotJSON):
        locate(text, 0, ("a",))
    assert time.process_time() - before < 2


def resident_kb() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_reading_and_editing_leaks_nothing() -> None:
    body = b'{"model":"a","messages":[{"role":"user","content":"' + b"x" * 5000 + b'"},{"a":[1]}]}'
    references = sys.getrefcount(body)

    def work(times: int) -> None:
        for _ in range(times):
            found = document(body)
            found.set(("messages", 1, "a", 0), 2)
            found.encode()
            found.raw("stream")

    work(1000)
    gc.collect()
    before = resident_kb()
    work(10_000)  # 50 MB if one body in each round stayed
    assert resident_kb() - before < 10_000
    assert sys.getrefcount(body) == references


def test_places_stay_exact_when_equal_values_stand_before_and_the_body_moves_in_memory() -> None:
    for size in range(0, 4000, 97):
        body = bytearray(b'{"x":[{"content":"c"}],"messages":[{"content":"c"},{"content":"c"}]}')
        body[1:1] = b" " * size
        found = document(bytes(body))
        gc.collect()
        span = found.locate(("messages", 1, "content"))
        assert span == (body.rindex(b'"c"'), body.rindex(b'"c"') + 3)


def test_several_values_are_replaced_in_one_pass() -> None:
    raw = b'{"a": [1, {"b": "x"}, 3], "a": [1, {"b": "y", "c": 2}, 3], "d": {}}'
    values = {("a", 1, "b"): "é", ("a", 2): None, ("d", "new"): [1], ("a", 1, "c"): 5}
    out = splice_all(raw, values)
    expected = raw.replace(b'"y"', '"é"'.encode()).replace(b'"c": 2}, 3', b'"c": 5}, null')
    assert out == expected.replace(b"{}", b'{"new":[1]}')
    with pytest.raises(KeyError):
        splice_all(raw, {("a", 7): 1})
