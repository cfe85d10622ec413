"""Which piece of a text a recall brings."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kimi_core import tokens
from kimi_core.recall.excerpt import MAX_PATTERN, MAX_TOKENS, Wanted, excerpt

LINES = "\n".join(f"line {number} of the log, as it came" for number in range(1, 2001))


def count(text: str) -> int:
    return tokens.tokenizer_for("o200k").count(text)


@pytest.mark.parametrize(
    ("text", "wanted", "said"),
    [
        ("a\nb\nc", Wanted(), "Lines 1 to 3 of 3:\na\nb\nc"),
        ("a\nb\nc\n", Wanted(), "Lines 1 to 3 of 3:\na\nb\nc"),
        ("", Wanted(), "Line 1 of 1:\n"),
        ("a\n\n", Wanted(), "Lines 1 to 2 of 2:\na\n"),
        ("a\nb\nc", Wanted(2), "Lines 2 to 3 of 3:\nb\nc"),
        ("a\nb\nc", Wanted(2, 2), "Line 2 of 3:\nb"),
        ("a\nb\nc", Wanted(2, 99), "Lines 2 to 3 of 3:\nb\nc"),
        ("a\nb\nc", Wanted(0), "Lines 1 to 3 of 3:\na\nb\nc"),
        ("a\nb\nc", Wanted(4), "The text has 3 lines; there is no line 4."),
        ("a", Wanted(2), "The text has 1 line; there is no line 2."),
        ("a\nb\nc", Wanted(3, 2), "to_line 2 is before from_line 3."),
        ("abcdef\nb", Wanted(1, 1, 4), "Line 1 of 2, from character 4:\ndef"),
        ("abc\nb", Wanted(1, None, 4), "Line 1 has 3 characters."),
        ("a\nB(\nab", Wanted(pattern="b"), "2: B(\n3: ab"),
        ("a\nB(\nab", Wanted(3, pattern="b"), "3: ab"),
        ("a\nB(\nab", Wanted(1, 2, pattern="b"), "2: B("),
        ("a\nB(\nab", Wanted(pattern="b("), "2: B("),
        ("a\nB(\nab", Wanted(pattern="^a$|b\\("), "1: a\n2: B("),
        ("a\n[b]", Wanted(pattern="[b]"), "2: [b]"),
        ("a\nb", Wanted(pattern="x"), "No line matches 'x' (lines 1 to 2 of 2)."),
        ("a\nx", Wanted(1, 1, pattern="x"), "No line matches 'x' (line 1 of 2)."),
        (
            "a",
            Wanted(pattern="x" * (MAX_PATTERN + 1)),
            "The pattern is longer than 500 characters.",
        ),
    ],
)
def test_what_is_wanted_comes(text: str, wanted: Wanted, said: str) -> None:
    assert excerpt(text, wanted) == said


def test_what_does_not_fit_is_asked_for_by_lines() -> None:
    first = excerpt(LINES, Wanted())
    assert count(first) <= MAX_TOKENS + 100
    head, *lines, note = first.split("\n")
    assert head == f"Lines 1 to {len(lines)} of 2000:"
    assert lines == LINES.split("\n")[: len(lines)]
    assert note.endswith(f"call again with from_line {len(lines) + 1}]")
    assert len(lines) > 250


TEXTS = st.one_of(
    st.text(max_size=200),
    st.builds(lambda piece, n: piece * n, st.text(min_size=1, max_size=30), st.integers(1, 4000)),
    st.lists(
        st.builds(lambda c, n: c * n, st.characters(), st.integers(0, 30_000)), max_size=4
    ).map("\n".join),
)


@given(TEXTS)
@example("x y" * 40_000)
@example("a\n" + "x y" * 40_000 + "\nb")
@example(" " * 200_000)
@example("\n" * 30_000)
@example("\U00010000" * 10_000 + "\n" + "0")
def test_who_goes_on_as_told_reads_all_of_it(text: str) -> None:
    read, wanted = "", Wanted()
    for _ in range(100):
        said = excerpt(text, wanted)
        assert count(said) <= MAX_TOKENS + 100
        _, _, rest = said.partition("\n")
        if "[kimi-proxy: this is as much as fits" not in rest.rpartition("\n")[2]:
            break
        shown, _, note = rest.rpartition("\n")
        numbers = [int(word.strip("]")) for word in note.split() if word.strip("]").isdigit()]
        character = numbers[1] if len(numbers) > 1 else 1
        assert (numbers[0], character) > (wanted.from_line, wanted.from_character)
        wanted = Wanted(numbers[0], None, character)
        read += shown + ("" if character > 1 else "\n")
    else:
        pytest.fail("it never ends")
    assert read + rest == text.removesuffix("\n")


def test_a_long_line_is_shown_round_its_match() -> None:
    text = "a" * 5000 + "needle" + "b" * 5000
    assert excerpt(text, Wanted(pattern="needle")) == (
        f"1: (from character 4801 of 10006) {'a' * 200}needle{'b' * 200}"
    )


def test_many_matches_come_in_parts() -> None:
    first = excerpt(LINES, Wanted(pattern="LOG"))
    *found, note = first.split("\n")
    assert count(first) <= MAX_TOKENS + 100
    assert found == [f"{n}: {line}" for n, line in enumerate(LINES.split("\n")[: len(found)], 1)]
    assert note.endswith(f"from_line {len(found) + 1}]")
    assert excerpt(LINES, Wanted(len(found) + 1, pattern="log")).startswith(f"{len(found) + 1}: ")


def test_a_pattern_that_never_ends_is_given_up() -> None:
    said = excerpt("found\n" + "a" * 5000 + "!", Wanted(pattern="(a|aa)+$|found"))
    assert said.startswith("1: found\n")
    assert "takes too long" in said


@pytest.mark.parametrize("pattern", ["(", "*", "[z", "(?P<", "a{2,1}", "\\"])
def test_what_is_no_expression_is_plain_text(pattern: str) -> None:
    assert excerpt(f"a\nb{pattern}c", Wanted(pattern=pattern)) == f"2: b{pattern}c"


def test_lone_surrogates_are_text() -> None:
    assert excerpt("a\n\ud800b", Wanted(pattern="\ud800")) == "2: \ud800b"
    assert excerpt("\ud800", Wanted()) == "Line 1 of 1:\n\ud800"
