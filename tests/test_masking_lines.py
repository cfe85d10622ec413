"""Lines as they are compared: control codes, numbers and trailing white space apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_core.masking import lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m text\x1b[K", "red text"),
        ("\x1b]0;a title\x07text", "text"),
        ("one\r\ntwo \t\r\n", "one\ntwo\n"),
        (
            "Receiving objects: 1 %\rReceiving objects: 100 %, done.",
            "Receiving objects: 100 %, done.",
        ),
        (
            " 0%|  | 0/9 [?it/s]\r 50%|# | 4/9 [7it/s]\r100%|##| 9/9 [7it/s]",
            "100%|##| 9/9 [7it/s]",
        ),
        ("first\rsecond\rthird", "first\nsecond\nthird"),
        ("working -\x08\\\x08|\x08 \x08done", "working done"),
        ("\x08\x08x", "x"),
        ("plain", "plain"),
        ("", ""),
    ],
)
def test_what_a_terminal_would_not_show_is_left_out(text: str, shown: str) -> None:
    assert "\n".join(lines.read(text).texts) == shown


@pytest.mark.parametrize(
    ("text", "numbers", "bare"),
    [
        ("     1\tdef f():\n     2\t\n     3\t    x", [1, 2, 3], ["def f():", "", "    x"]),
        ("12:a\n13:\n14:  b", [12, 13, 14], ["a", "", "  b"]),
        ("  9| a\n 10| b", [9, 10], [" a", " b"]),
        ("  9→a\n 10→b", [9, 10], ["a", "b"]),
        ("head\n1:a\n2:b\ntail", [-1, 1, 2, -1], ["head", "a", "b", "tail"]),
        ("12:30:01 a\n12:30:02 b", [-1, -1], ["12:30:01 a", "12:30:02 b"]),
        ("4:a\n9:b", [-1, -1], ["4:a", "9:b"]),
        ("1\n2\n3", [-1, -1, -1], ["1", "2", "3"]),
    ],
)
def test_the_numbers_of_a_listing_are_no_part_of_its_lines(
    text: str, numbers: list[int], bare: list[str]
) -> None:
    found = lines.read(text)
    assert found.numbers == numbers
    assert [found.bare(n) for n in range(len(found))] == bare
    for line, hash in zip(bare, found.hashes, strict=True):
        assert lines.read(line).hashes == [hash]


@given(st.text(alphabet="\r\x08\x1b[]()0m;12:\t\n a\ud800"))
def test_any_text_is_read(text: str) -> None:
    found = lines.read(text)
    assert len(found.texts) == len(found.hashes) == len(found.numbers) > text.count("\n")
    assert all(found.hashes)
    assert not any("\n" in line for line in found.texts)
