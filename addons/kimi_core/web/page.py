"""The page itself and its files."""

from __future__ import annotations

import asyncio
from typing import Any

from kimi_core.api import ApiError
from kimi_core.web.handler import Handler

FILES = {
    "app.js": "text/javascript; charset=utf-8",
    "elements.js": "text/javascript; charset=utf-8",
    "savings.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


class Page(Handler):
    """The page itself. The first visit brings the token in the URL and gets a cookie for it."""

    async def get(self) -> None:
        if self.argument("token") is not None:
            self.set_cookie(
                self.cookie_name, self.cookie_value, httponly=True, samesite="Strict", path="/"
            )
            self.redirect("/")
            return
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.finish(await asyncio.to_thread((self.site.folder / "index.html").read_bytes))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        if status_code != 401:
            super().write_error(status_code, **kwargs)
            return
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.finish((self.site.folder / "token.html").read_bytes())


class File(Handler):
    """A file of the page; it tells nothing that the source code does not."""

    needs_token = False

    async def get(self, name: str) -> None:
        self.set_header("Content-Type", FILES[name])
        self.set_header("Cache-Control", "no-cache")
        self.finish(await asyncio.to_thread((self.site.folder / name).read_bytes))

    def compute_etag(self) -> str | None:
        return super(Handler, self).compute_etag()


class Unknown(Handler):
    async def get(self) -> None:
        raise ApiError(404, "there is no such address", path=self.request.path)

    head = post = put = delete = patch = options = get
