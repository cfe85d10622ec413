"""What the addons answer: their endpoints, found when they are asked for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from urllib.parse import unquote

import msgspec

from kimi_core.api import ApiError, Asked, Endpoint
from kimi_core.store import StoreError
from kimi_core.web.handler import Handler

PREFIX = "/api/"


def endpoints(members: Iterable[object]) -> Iterator[Endpoint]:
    """Yield what the addons of a suite answer; one that was loaded just now is among them."""
    for member in members:
        offered = getattr(member, "endpoints", None)
        if callable(offered):
            yield from offered()


class Mounted(Handler):
    """Hands a request to the addon whose endpoint it is; whatever nobody has is a 404."""

    async def get(self) -> None:
        found = self._found()
        method = "GET" if self.request.method == "HEAD" else self.request.method
        match = next((one for one in found if one[0].method == method), None)
        if not found:
            raise ApiError(404, "there is no such address", path=self.request.path)
        if match is None:
            raise ApiError(405, "the address does not answer this method")
        endpoint, path = match
        body = self._body() if method == "POST" else {}
        query = {
            name: self.get_query_argument(name, strip=False)
            for name in self.request.query_arguments
            if name != "token"
        }
        try:
            answer = endpoint.answer(Asked(path, query, body))
            self.answer(await answer if inspect.isawaitable(answer) else answer)
            if method == "POST":
                self.site.announce()  # to the other pages that are open
        except StoreError as error:
            raise ApiError(503, str(error)) from error

    head = post = put = delete = patch = options = get

    def allowed(self) -> set[str]:
        methods: set[str] = {endpoint.method for endpoint, _ in self._found()}
        return methods | {"HEAD"} if "GET" in methods else methods

    def _found(self) -> list[tuple[Endpoint, tuple[str, ...]]]:
        """Return the endpoints at this address, each with what its groups matched."""
        path = self.request.path
        if not path.startswith(PREFIX):
            return []
        return [
            (endpoint, tuple(unquote(group or "") for group in match.groups()))
            for endpoint in endpoints(self.site.proxy.members)
            if (match := re.fullmatch(endpoint.pattern, path[len(PREFIX) :]))
        ]

    def _body(self) -> dict[str, object]:
        if not self.request.body:
            return {}
        kind = self.request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        # A form of another site's can send any other kind without asking first.
        if kind != "application/json":
            raise ApiError(415, "a body is a JSON object, sent as application/json")
        try:
            return msgspec.json.decode(self.request.body, type=dict[str, object])
        except (msgspec.MsgspecError, RecursionError, ValueError):
            raise ApiError(400, "the body is no JSON object") from None
