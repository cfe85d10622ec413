"""Blocks that a program put into a user's message, told from what a person typed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_core.masking import pasted


def blocks(text: str) -> list[str]:
    return [text[start:end] for start, end, _ in pasted.blocks(text)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Fix\n```src/a.py (1-20)\nx = 1\n```\nplease", ["x = 1"]),
        ("```py src/a.py\nx\ny\n```", ["x\ny"]),
        ("~~~~ main.go\n```\n~~~\n~~~~", ["```\n~~~"]),
        ('a <file name="x">\none\n</file> b <file>two</file>', ["\none\n", "two"]),
        (
            "<document><document_content>a</document_content></document>",
            ["<document_content>a</document_content>"],
        ),
        ("<attached_files>a</attached_files>", ["a"]),
        ("<stdout>a</stdout><stderr></stderr>", ["a", ""]),
        ("@codebase where is it?\n```python\nx\n```", ["x"]),
        ("```console output\nx\n```", ["x"]),
        ("```python\nx = 1\n```", []),
        ("```\nx = 1\n```", []),
        ("<b>bold</b> and <file>open", []),
        ("```src/a.py\nnever closed", []),
        ("write to me@file.com", []),
        ("", []),
    ],
)
def test_blocks_of_files_and_output_are_found(text: str, found: list[str]) -> None:
    assert blocks(text) == found


@given(st.lists(st.sampled_from(["```", "```a.py", "<file>", "</file>", "~~~", "\n", "x", " "])))
def test_blocks_lie_in_their_order_and_within_the_text(pieces: list[str]) -> None:
    text = "".join(pieces)
    at = 0
    for start, end, _ in pasted.blocks(text):
        assert at <= start <= end <= len(text)
        at = end
