"""What of a request leaves in another form: decided once for each message, and kept to.

A conversation comes again with every turn. What was decided on its messages is remembered by
the chain of their digests, so that only what is new is read, and by policy in the store, so that
another process decides the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import xxhash

from kimi_core.context import Context, read
from kimi_core.document import splice_all
from kimi_core.exchange import Message, SavingKind
from kimi_core.masking.conversation import Change, Conversation
from kimi_core.masking.policy import Policy
from kimi_core.memo import Memo

_CONVERSATIONS = 256
"""Of so many the state is kept; any other is read again from its beginning."""
_PLANS = 512
_DECISIONS = 32_768
_RAWS = 1024
_LOOK_BACK = 64
"""How many messages a turn may add before its conversation is looked at as a new one."""

OFF = "off"
"""The policy of what is sent as it came, in the store."""


@dataclass(frozen=True, slots=True)
class Mask:
    """A text that is left out of one message, without the original."""

    message: int
    part: int
    """Which of the message's parts it stands for."""
    text: str
    hash: str
    kind: SavingKind
    tokens: int
    sent_tokens: int
    label: str
    new: bool
    """Decided now; otherwise it was so when the message was sent before."""


@dataclass(frozen=True, slots=True)
class Form:
    """How one message leaves: its masks, and a digest of what they put there."""

    message: int
    masks: tuple[Mask, ...]
    digest: bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of the messages of one request."""

    forms: tuple[Form, ...]
    """Of each message that does not leave as it came, in their order."""
    known: int
    """So many of its messages had been decided on before."""
    digest: bytes
    """By which the decision is recognised: the conversation so far, and whose it is."""
    policies: tuple[tuple[int, str], ...]
    """Up to which message which policy holds, by what `Policy.parse` reads; or `OFF`."""
    decided: tuple[tuple[bytes, str], ...] = ()
    """What is new, for the store: the conversation up to each message, and its policy."""

    @property
    def masks(self) -> list[Mask]:
        return [mask for form in self.forms for mask in form.masks]


class Masker:
    """Decides what of each request is left out; may be used from several threads.

    `owner` is whose conversation it is, a key's hash: nobody's decisions are another's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._plans: Memo[bytes, Plan] = Memo(_PLANS)
        self._states: Memo[bytes, Conversation] = Memo(_CONVERSATIONS // 2)
        self._decisions: Memo[bytes, str] = Memo(_DECISIONS)
        self._raws: Memo[tuple[bytes, bytes], bytes] = Memo(_RAWS)

    def remember(self, decisions: Iterable[tuple[bytes, str]]) -> None:
        """Take what the store knows, the oldest first: digests of plans, and their last policy."""
        for digest, policy in decisions:
            self._decisions.put(digest, policy)

    def digests(self, context: Context, owner: str) -> list[bytes]:
        """Return by what the decisions on each prefix of the conversation are recognised."""
        seed = owner.encode()
        return [xxhash.xxh3_128_digest(seed + chain) for chain in context.chains]

    def unread(self, context: Context, owner: str) -> tuple[int, bool]:
        """Return how many bytes `plan` will have to read, and if it goes on from what is known."""
        found = self._longest(context, owner)
        first = found.known if found is not None else 0
        if found is not None and first < len(context) and self._states.get(found.digest) is None:
            first = 0
        new = (context.raw(index) for index in range(first, len(context)))
        return sum(len(memoryview(raw)) for raw in new), found is not None

    def plan(
        self,
        context: Context,
        owner: str,
        policy: Policy | None,
        look_up: Callable[[Sequence[bytes]], Mapping[bytes, str]] | None = None,
    ) -> Plan:
        """Return what becomes of a request's messages; None: the new ones are sent as they came.

        What was decided on a message before holds, whatever the policy says now. `look_up`
        returns what the store knows of digests, for a conversation that is new here.
        """
        before = self._longest(context, owner)
        if before is not None and before.known == len(context):
            return before
        digests = self.digests(context, owner)
        if before is None:
            if look_up is not None:
                self.remember(look_up(digests).items())
            policies = self._recorded(digests)
            known = policies[-1][0] if policies else 0
            forms: tuple[Form, ...] = ()
            state, first = Conversation(), 0
        else:
            policies, known, forms = before.policies, before.known, before.forms
            with self._lock:
                taken = self._states.pop(before.digest)
            if taken is not None:
                state, first = taken, known
            else:
                state, first, forms = Conversation(), 0, ()
        policies = _extended(policies, len(context), str(policy) if policy else OFF)
        forms += self._decide(context, state, policies, first, known)
        decided = tuple(zip(digests[known:], _each(policies)[known:], strict=True))
        made = Plan(forms, known, digests[-1] if digests else b"", policies, decided)
        if digests:
            self._keep(made, len(context), state)
        return made

    def again(self, context: Context, owner: str, policy: Policy | None, first: int = 0) -> Plan:
        """Decide anew from the `first` message on, and forget what was decided there."""
        digests = self.digests(context, owner)
        before = self._longest(context, owner)
        policies = before.policies if before is not None else self._recorded(digests)
        with self._lock:
            for digest in digests[first:]:
                self._plans.pop(digest)
                self._states.pop(digest)
                self._decisions.pop(digest)
            for end, decided in policies if first else ():
                self._decisions.put(digests[min(end, first) - 1], decided)
                if end >= first:
                    break
        return self.plan(context, owner, policy)

    def changed(self, context: Context, plan: Plan) -> dict[int, bytes]:
        """Return the JSON text of each message that leaves in another form, by its index."""
        found: dict[int, bytes] = {}
        for form in plan.forms:
            # By what is put there: an original is pointed elsewhere in another conversation.
            key = context.plain[form.message], form.digest
            known = self._raws.get(key)
            if known is None:
                known = _masked(context, form)
                self._raws.put(key, known)
            found[form.message] = known
        return found

    def _longest(self, context: Context, owner: str) -> Plan | None:
        """Return the plan of the longest part of the conversation that has one.

        Its `known` is then the number of that part's messages.
        """
        seed = owner.encode()
        last = len(context) - 1
        for index in range(last, max(-1, last - _LOOK_BACK), -1):
            found = self._plans.get(xxhash.xxh3_128_digest(seed + context.chains[index]))
            if found is not None:
                return found
        return None

    def _recorded(self, digests: Sequence[bytes]) -> tuple[tuple[int, str], ...]:
        """Return which policies hold up to which message, as far as any is recorded."""
        found = self._decisions.get_many(digests)
        policies: tuple[tuple[int, str], ...] = ()
        for index, policy in enumerate(found):
            if policy is not None:
                policies = _extended(policies, index + 1, policy)
        return policies

    def _decide(
        self,
        context: Context,
        state: Conversation,
        policies: Sequence[tuple[int, str]],
        first: int,
        known: int,
    ) -> tuple[Form, ...]:
        forms: list[Form] = []
        start = 0
        for end, said in policies:
            policy = None if said == OFF else Policy.parse(said)
            for index in range(max(first, start), end):
                message = _read(context, index)
                if changes := state.take(message, policy):
                    forms.append(_form(index, message, changes, new=index >= known))
            start = end
        return tuple(forms)

    def _keep(self, made: Plan, length: int, state: Conversation) -> None:
        """Remember a plan as that of a conversation which the next turn continues."""
        later = Plan(tuple(map(_settled, made.forms)), length, made.digest, made.policies)
        with self._lock:
            self._plans.put(made.digest, later)
            self._states.put(made.digest, state)
            # Of each message: a client that edits its last one goes on from within.
            for digest, policy in made.decided:
                self._decisions.put(digest, policy)


def originals(context: Context, masks: Iterable[Mask]) -> dict[str, str]:
    """Return the texts behind these masks by their hashes, out of the request with them."""
    by_message: dict[int, list[Mask]] = {}
    for mask in masks:
        by_message.setdefault(mask.message, []).append(mask)
    found: dict[str, str] = {}
    for index, wanted in by_message.items():
        parts = _read(context, index).parts
        found |= {mask.hash: parts[mask.part].text for mask in wanted}
    return found


def _masked(context: Context, form: Form) -> bytes:
    parts = _read(context, form.message).parts
    # By its place among the parts: a text that stood alone may have become a list of one block.
    values = {parts[mask.part].path: mask.text for mask in form.masks}
    return splice_all(bytes(context.raw(form.message)), values)


def _form(index: int, message: Message, changes: Iterable[Change], *, new: bool) -> Form:
    places = {part.path: number for number, part in enumerate(message.parts)}
    masks = tuple(
        Mask(
            message=index,
            part=places[change.path],
            text=change.text,
            hash=change.hash,
            kind="cut" if "cut" in change.kinds else "reference",
            tokens=change.tokens,
            sent_tokens=change.sent_tokens,
            label=change.label,
            new=new,
        )
        for change in changes
    )
    said = "\0".join(f"{mask.part} {mask.text}" for mask in masks)
    return Form(index, masks, xxhash.xxh3_128_digest(said.encode("utf-8", "surrogatepass")))


def _settled(form: Form) -> Form:
    """Return a form as that of a message which was sent so before."""
    if not form.masks[0].new:
        return form
    return replace(form, masks=tuple(replace(mask, new=False) for mask in form.masks))


def _read(context: Context, index: int) -> Message:
    return read(context.dialect, context.message(index).unit)


def _each(policies: Iterable[tuple[int, str]]) -> list[str]:
    """Return the policy of each message."""
    each: list[str] = []
    for end, policy in policies:
        each += [policy] * (end - len(each))
    return each


def _extended(
    policies: tuple[tuple[int, str], ...], length: int, policy: str
) -> tuple[tuple[int, str], ...]:
    """Return the policies up to `length` messages, the rest of them under `policy`."""
    if policies and policies[-1][1] == policy:
        policies = policies[:-1]
    elif policies and policies[-1][0] >= length:
        return policies
    return (*policies, (length, policy))
