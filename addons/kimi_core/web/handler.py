"""What a request to the stats page must prove, and how it is answered."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import msgspec
from tornado import web
from tornado.iostream import StreamClosedError

from kimi_core.api import ApiError
from kimi_core.store import StoreError

if TYPE_CHECKING:
    from kimi_core.web.site import Site

logger = logging.getLogger(__name__)

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
MAX_ROWS = 1000

P = ParamSpec("P")
T = TypeVar("T")

_HOST = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+)(?::(?P<port>[0-9]{1,5}))?")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Handler(web.RequestHandler):
    """Answers only whom the page is for; errors are JSON."""

    site: Site
    needs_token = True

    def initialize(self, site: Site) -> None:
        self.site = site

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        for name, value in HEADERS.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        host = self.request.headers.get("Host", "")
        # A name of somebody else's that leads here makes his page ours for the browser: DNS
        # rebinding. So the name has to be one of ours, whatever the token.
        if not self._is_ours(host):
            raise ApiError(
                403, "this host name is not the stats page's; kimi_hosts lists further ones"
            )
        origin = self.request.headers.get("Origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise ApiError(403, "another site's page may not ask the stats page")
        if self.needs_token and not self.has_token():
            raise ApiError(
                401,
                "the token is missing or wrong; open the address that the proxy printed "
                "when it started, or send it as Authorization: Bearer",
            )
        if origin is None and self.request.method not in ("GET", "HEAD") and not self.bearer():
            # Only a browser sends the cookie, and a browser names the origin.
            raise ApiError(403, "a change needs an Origin header, or Authorization: Bearer")

    def _is_ours(self, written: str) -> bool:
        found = _HOST.fullmatch(written)
        if found is None:
            return False
        host, port = found["host"].strip("[]").lower(), found["port"] or "80"
        if host in self.site.proxy.hosts or f"{host}:{port}" in self.site.proxy.hosts:
            return True
        if int(port) != self.site.port:
            return False
        if self.site.proxy.is_local(host, self.site.host):
            return True
        # Off loopback a client names an address of this machine. No page can make a browser send
        # another site's requests under an address; a name, anybody can.
        return not self.site.proxy.is_local(self.site.host) and _is_address(host)

    @property
    def cookie_name(self) -> str:
        # A browser sends the cookies of one port to every port of the host.
        return f"kimi-proxy-{self.site.port}"

    @property
    def cookie_value(self) -> str:
        # For the same reason not the token itself, which a person may have chosen.
        return hmac.new(self.site.token.encode(), b"cookie", hashlib.sha256).hexdigest()

    def bearer(self) -> bool:
        scheme, _, given = self.request.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and _same(given.strip(), self.site.token)

    def has_token(self) -> bool:
        return (
            self.bearer()
            or _same(self.get_cookie(self.cookie_name) or "", self.cookie_value)
            or _same(self.get_query_argument("token", ""), self.site.token)
        )

    async def read(self, question: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the answer of a reader of the store, asked in a thread."""
        try:
            return await asyncio.to_thread(question, *args, **kwargs)
        except StoreError as error:
            raise ApiError(503, str(error)) from error

    def answer(self, value: object) -> None:
        self.set_header("Content-Type", "application/json; charset=utf-8")
        try:
            # Infinity and NaN, which JSON has not, become null.
            text = msgspec.json.encode(value)
        except UnicodeEncodeError:  # half a surrogate pair, which only an escape can say
            text = json.dumps(msgspec.to_builtins(value)).encode()
        self.finish(text)

    def limit(self) -> int:
        text = self.get_query_argument("limit", "50")
        if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= MAX_ROWS:
            raise ApiError(400, f"limit must be a whole number from 1 to {MAX_ROWS}")
        return int(text)

    def argument(self, name: str) -> str | None:
        return self.get_query_argument(name, "") or None

    def compute_etag(self) -> str | None:
        return None

    def allowed(self) -> set[str]:
        """Return the methods that the address answers."""
        kind, unanswered = type(self), web.RequestHandler
        return {
            method
            for method in self.SUPPORTED_METHODS
            if getattr(kind, method.lower()) is not getattr(unanswered, method.lower())
        }

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        # tornado takes the status from its own kind of exception only.
        error = _raised(kwargs)
        super().send_error(error.status if error else status_code, **kwargs)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        if status_code == 401:
            self.set_header("WWW-Authenticate", 'Bearer realm="kimi-proxy"')
        elif status_code == 405:
            self.set_header("Allow", ", ".join(sorted(self.allowed())))
        error = _raised(kwargs)
        if error is not None:
            self.answer({"error": error.error, **error.more})
        else:
            self.answer({"error": HTTPStatus(status_code).phrase.lower()})

    def log_exception(
        self,
        typ: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if isinstance(value, (ApiError, web.HTTPError, StreamClosedError)):
            return
        # Not the text of the error, nor the query: they may hold what must not be logged.
        while tb is not None and tb.tb_next is not None:
            tb = tb.tb_next
        where = f"{Path(tb.tb_frame.f_code.co_filename).name}:{tb.tb_lineno}" if tb else ""
        logger.warning(
            "The stats page failed at %s: %s at %s",
            self.request.path,
            typ.__name__ if typ else "error",
            where,
        )


def _raised(kwargs: Mapping[str, Any]) -> ApiError | None:
    error = kwargs.get("exc_info", (None, None, None))[1]
    return error if isinstance(error, ApiError) else None


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())


class Api(Handler):
    """A read of the API; HEAD gives what GET would, without its body."""

    async def head(self, *path: str) -> None:
        await self.get(*path)  # type: ignore[misc]
