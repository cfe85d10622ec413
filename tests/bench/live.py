"""What a real mitmdump with the whole chain sends: the bytes that the provider received."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from bench.direct import body
from bench.traces import Trace
from kimi_core.dialects import OPENAI
from kimi_core.document import Document
from kimi_core.masking.policy import Policy
from kimi_core.store import StoreReader
from proxy import Proxy
from upstream import Reply, Upstream

RULES = """\
  replayed: {{context: 1000000, targets: [{{provider: local}}]}}
sanitizer: {{threshold: {threshold}, keep: {keep}, references: {references}}}
"""
_USUAL = re.compile(r"Loading script|listening at|(?:client|server) (?:dis)?connect")


class Live:
    """`with Live(folder, policy) as live`: two proxies before one provider.

    The second one gets only the last request of each conversation: it decides afresh.
    """

    def __init__(self, folder: Path, policy: Policy | None) -> None:
        self._folder = folder
        self._policy = policy
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._up = stack.enter_context(Upstream(keep=1, default=Reply(text="Go on.")))
            self._first = self._proxy(stack, "first")
            self._second = self._proxy(stack, "second")
            self._clients = {
                proxy: stack.enter_context(proxy.base_client())
                for proxy in (self._first, self._second)
            }
            self._store = StoreReader(self._first.store)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stack.close()

    def send(self, trace: Trace, count: int) -> Sequence[bytes]:
        return self._received(self._first, trace, count)

    def afresh(self, trace: Trace, count: int) -> Sequence[bytes]:
        return self._received(self._second, trace, count)

    def original(self, hash: str) -> str | None:
        """Return what is on disk by this hash."""
        found = self._store.mask(hash)
        return None if found is None else found["original"]

    @property
    def complaints(self) -> list[str]:
        """What the proxies logged besides that they run."""
        logged = (self._first.output + self._second.output).splitlines()
        return [line for line in logged if line.strip() and not _USUAL.search(line)]

    def _received(self, proxy: Proxy, trace: Trace, count: int) -> Sequence[bytes]:
        answer = self._clients[proxy].post(
            "/v1/chat/completions",
            content=body(trace, count),
            headers={"content-type": "application/json", "authorization": "Bearer sk-bench"},
        )
        if answer.status_code != httpx.codes.OK:
            raise SystemExit(
                f"{trace.name}: the proxy answered {answer.status_code}: {answer.text[:300]}"
            )
        received = Document(self._up.requests[-1].content, OPENAI.shape)
        return tuple(map(bytes, received.elements("messages")))

    def _proxy(self, stack: ExitStack, name: str) -> Proxy:
        policy = self._policy or Policy()
        rules = RULES.format(
            threshold=policy.threshold,
            keep=policy.keep,
            references=str(policy.references).lower(),
        )
        options = ["flow_detail=0", f"sanitizer_mask={str(self._policy is not None).lower()}"]
        return stack.enter_context(
            Proxy(self._folder / name, self._up, more_rules=rules, options=options)
        )
