"""Results that come as a user's message: what is one, and what a person may have typed."""

from __future__ import annotations

import pytest

from kimi_core import dialects
from kimi_core.dialects import Unit
from kimi_core.document import encode
from kimi_core.exchange import Message
from kimi_core.masking.conversation import Change, Conversation
from kimi_core.masking.observed import results
from kimi_core.masking.policy import Policy

ASKED = "Let me look.\n```bash\ncat src/x.py\n```"
PROMPT = "\n(Open file: /repo/x.py)\n(Current directory: /repo)\nbash-$ "
SOURCE = "\n".join(f"value_{number} = compute_{number}(first, second)" for number in range(60))


@pytest.mark.parametrize(
    ("asked", "texts", "found"),
    [
        (ASKED, ["OBSERVATION:\nx = 1"], {0: "cat src/x.py"}),
        (ASKED, ["x = 1" + PROMPT], {0: "cat src/x.py"}),
        (ASKED, ["x = 1\n(Open file: n/a)\n(Current directory: /)\nbash-$"], {0: "cat src/x.py"}),
        ("", ["EXECUTION RESULT of [execute_bash]:\nx = 1"], {0: "execute_bash"}),
        ("", ["exitcode: 0 (execution succeeded)\nCode output: x"], {0: ""}),
        ("Thought: so.\nAction: search\nAction Input: x", ["Observation: found it"], {0: ""}),
        (
            "<read_file><path>a.py</path></read_file>",
            ["[read_file for 'a.py'] Result:", "1 | x = 1", "<environment_details>\nopen: a.py"],
            {1: "read_file for 'a.py'"},
        ),
        ("", ["[execute_command for 'ls'] Result:\na.py b.py"], {0: "execute_command for 'ls'"}),
        ("", ["[attempt_completion] Result:", "<feedback>\nNo, it fails"], {}),
        # A person's words.
        (ASKED, ["x = 1"], {}),
        (ASKED, ["Observation: the tests are slow"], {}),
        (ASKED, ["I saw OBSERVATION:\n in the log"], {}),
        (ASKED, ["I typed bash-$ and nothing came"], {}),
        (ASKED, [""], {}),
    ],
)
def test_what_stands_in_the_frame_of_an_agent_is_a_result(
    asked: str, texts: list[str], found: dict[int, str]
) -> None:
    assert results(asked, texts) == found


def message(role: str, content: object) -> Message:
    raw = encode({"role": role, "content": content})
    return dialects.OPENAI.read(Unit("message", raw, ("messages", 0)))


def taken(*messages: tuple[str, object]) -> list[tuple[Change, ...]]:
    conversation = Conversation()
    return [conversation.take(message(*one), Policy()) for one in messages]


@pytest.mark.parametrize("listed", [False, True])
def test_what_it_shows_again_is_pointed_at(listed: bool) -> None:
    said: object = SOURCE + PROMPT
    if listed:
        said = [{"type": "text", "text": said}]
    found = taken(
        ("user", "Mend it."),
        ("assistant", ASKED),
        ("user", said),
        ("assistant", ASKED),
        ("user", said),
    )
    assert found[:4] == [(), (), (), ()]
    (change,) = found[4]
    assert change.kinds == ("reference",)
    assert "result 1" in change.text
    assert change.sent_tokens < change.tokens / 5


def test_only_what_follows_a_message_of_the_model_is_one() -> None:
    task = SOURCE + PROMPT  # a demonstration at the head of a conversation
    assert taken(("user", task), ("user", task)) == [(), ()]
    assert taken(("user", task), ("assistant", ASKED), ("user", SOURCE))[2] == ()


def test_what_is_observed_is_read_in_a_copy_too() -> None:
    first = Conversation()
    for one in (("user", "Mend it."), ("assistant", ASKED), ("user", SOURCE + PROMPT)):
        first.take(message(*one), Policy())
    first.take(message("assistant", ASKED), Policy())
    again = message("user", SOURCE + PROMPT)
    assert first.copy().take(again, Policy()) == first.take(again, Policy()) != ()
