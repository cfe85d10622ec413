"""What a compression would replace, what it would save, and the summary that comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import Raw

from kimi_core import tokens
from kimi_core.compaction import cuts, rewrite
from kimi_core.compaction.asking import Answer, SummaryFailed, Target
from kimi_core.compaction.cuts import Head
from kimi_core.compaction.prompt import WORDS, instructions, question
from kimi_core.compaction.summaries import Summary, prefix_id
from kimi_core.context import Context, Counter
from kimi_core.dialects import RESPONSES, Dialect
from kimi_core.document import Document
from kimi_core.exchange import Message
from kimi_core.masking.policy import Policy
from kimi_core.rules_schema import Profile

WORTH = 0.6
"""The share of what is sent that a compression has to save: the provider's cache is lost by it."""

MODEL = "o200k"
"""What tokens are counted by, whatever the model."""

Size = Callable[[Context], int]
"""Returns the tokens of a request as it leaves, which masking may have made fewer."""

_TOKENS_PER_WORD = 2
_REFERENCE = b'"item_reference"'


class NotWorth(Exception):
    """There is nothing to compress, or too little; the text says why."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The last request of a conversation, as the client sent it."""

    dialect: Dialect
    body: bytes
    owner: str
    session: str

    def document(self) -> Document:
        return Document(self.body, self.dialect.shape)


@dataclass(frozen=True, slots=True)
class Plan:
    """A cut that is worth its summary, and what to write it from."""

    conversation: Conversation
    given: Context
    end: int
    head: Head
    replaced: Sequence[Message]
    """What is summarised, without what an earlier summary tells already."""
    earlier: str
    """That summary."""
    base: str
    """Its id; empty when there is none."""
    full: int
    """Tokens of the whole request as it would leave without any summary."""
    sent: int
    """Tokens of it as it leaves now."""
    least: int
    """So many tokens of it have to be saved."""


def is_whole(document: Document, dialect: Dialect) -> bool:
    """Tell whether a request has all of its conversation, none of it kept by the provider."""
    if dialect is not RESPONSES:
        return True
    if document.get("previous_response_id") or document.get("conversation"):
        return False
    # What an item refers to may belong to its neighbour, and only the provider knows.
    return not any(map(_is_reference, dialect.messages(document).raws))


def _is_reference(raw: bytes | Raw) -> bool:
    text = bytes(raw)
    # It may do without a type, unlike all others but messages.
    if not text.startswith(b"{"):
        return False
    return _REFERENCE in text or (b'"type"' not in text and b'"role"' not in text)


def plan(
    conversation: Conversation,
    size: Size,
    keep_exchanges: int,
    profile: Profile,
    base: Summary | None = None,
    in_force: Summary | None = None,
    *,
    least: float = WORTH,
    growth: float = 1.0,
) -> Plan:
    """Return how to compress a conversation further than `base` does.

    `in_force` is the summary that the request leaves with now. `least` is the share that has to be
    saved of what is sent, when that is `growth` times as long as now. Takes some milliseconds, and
    more where masking looks at a conversation first: to be called from a thread. Raises NotWorth.
    """
    document, dialect = conversation.document(), conversation.dialect
    if not is_whole(document, dialect):
        raise NotWorth("the provider keeps the conversation, and the request has only what is new")
    given = Context(dialect, document)
    messages = cuts.messages_of(given)
    after = base.messages if base else 0
    end = cuts.find(given, messages, keep_exchanges, after)
    if not end:
        raise NotWorth(f"nothing stands before the last {keep_exchanges} exchanges")
    head = cuts.head(given, end)
    sent = size(as_sent(conversation, given, in_force))
    full = sent + (in_force.saved if in_force else 0)
    made = rewrite.compress(conversation.document(), given, end, head, "")
    expected = size(made) + WORDS[profile] * _TOKENS_PER_WORD
    later = growth * sent
    share = (sent - expected) / later if later else 0.0
    if share <= 0:
        raise NotWorth("a summary would be longer than what it replaces")
    if share < least:
        raise NotWorth(
            f"it would save {100 * share:.0f} % of what is sent, and less than {100 * least:.0f} % "
            "is not worth the provider's cache"
        )
    kept = set(head.kept)
    replaced = [message for n, message in enumerate(messages[:end]) if n >= after and n not in kept]
    earlier = rewrite.summary_in(base.text) if base else ""
    return Plan(
        conversation,
        given,
        end,
        head,
        replaced,
        earlier,
        base.id if base else "",
        full,
        sent,
        int(least * later),
    )


def as_sent(conversation: Conversation, given: Context, in_force: Summary | None) -> Context:
    """Return the context of a conversation with the summary that is in force."""
    if in_force is None:
        return given
    end = in_force.messages
    head = cuts.head(given, end)
    return rewrite.compress(conversation.document(), given, end, head, in_force.text)


def count(given: Context, counter: Counter) -> int:
    """Return the tokens of a request by o200k."""
    return sum(counter.count_in(given, MODEL).values())


def asked(found: Plan, profile: Profile, window: int | None) -> tuple[str, str]:
    """Return system prompt and question for a model with this window."""
    return instructions(profile), question(found.replaced, found.earlier, window)


def summary(
    found: Plan,
    text: str,
    size: Size,
    target: Target | None = None,
    answer: Answer | None = None,
    cost: float | None = None,
) -> Summary:
    """Return a text as the summary of a plan; without a target it is an extract.

    Raises SummaryFailed when it saves too little.
    """
    conversation, given = found.conversation, found.given
    stands = rewrite.stand_in(given, found.end, found.head, text)
    made = rewrite.compress(conversation.document(), given, found.end, found.head, stands)
    after = size(made)
    if not text.strip():
        raise SummaryFailed("the summary is empty", answer)
    if found.sent - after <= max(0, found.least):
        raise SummaryFailed("the summary is too long for what it replaces", answer)
    usage = answer.usage if answer else None
    return Summary(
        id=prefix_id(given.chains, conversation.owner, found.end),
        owner=conversation.owner,
        session=conversation.session,
        messages=found.end,
        text=stands,
        source="model" if target else "extract",
        model=target.model if target else "",
        provider=target.provider if target else "",
        input_tokens=(usage and usage.input_tokens) or 0,
        output_tokens=(usage and usage.output_tokens) or 0,
        cost_usd=cost,
        tokens_before=found.full,
        tokens_after=after,
        messages_before=len(given),
        messages_after=len(made),
        created_at=time.time(),
        base=found.base,
    )


def estimated(message: Message, policy: Policy | None = None) -> int:
    """Return about how many tokens a message takes, masked by `policy`, without counting them."""
    total = 0
    for part in message.parts:
        size = len(part.text) // 4 + 4
        if part.kind == "tool_result" and policy and 0 < policy.threshold < size:
            size = policy.keep
        total += tokens.DEFAULT_IMAGE_TOKENS if part.kind == "image" else size
    return total


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """Return what summaries, rows of the store, saved and took.

    `tokens_saved` counts each request that left with one, by o200k; `compression_ratio` is the
    mean share that they leave out.
    """
    shares = [
        1 - row["tokens_after"] / row["tokens_before"] for row in rows if row["tokens_before"]
    ]
    costs = [row["cost_usd"] for row in rows if row["cost_usd"] is not None]
    return {
        "summaries": len(rows),
        "revoked": sum(row["revoked_at"] is not None for row in rows),
        "requests": sum(row["applied"] or 0 for row in rows),
        "tokens_saved": sum(
            (row["applied"] or 0) * (row["tokens_before"] - row["tokens_after"])
            for row in rows
            if row["tokens_before"] and row["tokens_after"]
        ),
        "compression_ratio": round(sum(shares) / len(shares), 4) if shares else None,
        "cost_usd": sum(costs) if costs else None,
    }
