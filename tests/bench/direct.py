"""What the Sanitizer sends, by the same functions, without a proxy in between."""

from __future__ import annotations

from collections.abc import Sequence

from bench.traces import Trace
from kimi_core.context import Context
from kimi_core.dialects import OPENAI
from kimi_core.document import Document
from kimi_core.masking.policy import Policy
from kimi_core.masking.requests import Masker, Plan, originals

_OWNER = "bench"


class Direct:
    """Sends requests as `policy` has them; None: as they are."""

    def __init__(self, policy: Policy | None) -> None:
        self._policy = policy
        self._masker = Masker()
        self._store: dict[str, str] = {}

    def send(self, trace: Trace, count: int) -> Sequence[bytes]:
        given = Context(OPENAI, Document(body(trace, count), OPENAI.shape))
        plan = self._masker.plan(given, _OWNER, self._policy)
        self._store |= originals(given, plan.masks)
        return _sent(self._masker, given, plan)

    def afresh(self, trace: Trace, count: int) -> Sequence[bytes]:
        given = Context(OPENAI, Document(body(trace, count), OPENAI.shape))
        masker = Masker()
        return _sent(masker, given, masker.plan(given, _OWNER, self._policy))

    def original(self, hash: str) -> str | None:
        return self._store.get(hash)


def body(trace: Trace, count: int, model: str = "replayed") -> bytes:
    """Return the JSON text of a request with the first `count` messages."""
    tools = b',"tools":' + trace.tools if trace.tools else b""
    messages = b",".join(trace.messages[:count])
    return b'{"model":"%s","messages":[%s]%s}' % (model.encode(), messages, tools)


def _sent(masker: Masker, given: Context, plan: Plan) -> list[bytes]:
    changed = masker.changed(given, plan)
    return [changed.get(index) or bytes(given.raw(index)) for index in range(len(given))]
