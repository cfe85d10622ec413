"""What addons answer through the stats page's server, over real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from mitmproxy.addonmanager import Loader

from kimi_core import flows
from kimi_core.api import ApiError, Asked, Endpoint
from kimi_core.store import StoreError
from page import BEARER, TOKEN, Running, free_port, started
from proxy import Proxy, wait_until
from upstream import Upstream

LONE = "half a pair: \ud83d"


class Answering:
    """An addon that answers; what it was asked is kept."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []

    def load(self, loader: Loader) -> None:
        flows.join(self, loader)

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint("GET", "things", self._tell, "Things."),
            Endpoint("GET", "things/([^/]+)(?:/([0-9]+))?", self._tell, "One."),
            Endpoint("POST", "things/([^/]+)", self._later, "Change one."),
            Endpoint("POST", "change", self._tell, "Change."),
            Endpoint("GET", "fails/(.+)", self._fail, "Fail."),
            Endpoint("GET", "odd", lambda _: {"text": LONE, "number": math.inf}, "Odd."),
            Endpoint("GET", "unsayable", lambda _: {"value": object()}, "No JSON."),
            Endpoint("GET", "sessions", self._tell, "What the page itself answers."),
        ]

    def _tell(self, asked: Asked) -> dict[str, Any]:
        self.asked.append(asked)
        return {"path": asked.path, "query": dict(asked.query), "body": dict(asked.body)}

    async def _later(self, asked: Asked) -> dict[str, Any]:
        await asyncio.to_thread(lambda: None)
        return self._tell(asked)

    def _fail(self, asked: Asked) -> object:
        match asked.path[0]:
            case "known":
                raise ApiError(400, "too small", current_percentage=12.5, hint="wait")
            case "store":
                raise StoreError("the file cannot be read")
        raise RuntimeError("a secret of the addon's")


Scenario = Callable[[Running, Answering], Coroutine[Any, Any, None]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Scenario], None]:
    """Run a scenario against a page that was started before the addon was loaded."""

    def run(scenario: Scenario) -> None:
        async def main() -> None:
            async with started(tmp_path) as page:
                addon = Answering()
                assert (await page.get("/api/things")).status_code == 404
                page.context.master.addons.add(addon)
                await scenario(page, addon)

        asyncio.run(main())

    return run


async def post(page: Running, path: str, content: Any = None, **headers: str) -> httpx.Response:
    return await page.client.post(path, content=content, headers=BEARER | headers)


JSON = {"content-type": "application/json; charset=utf-8"}


def test_an_addon_answers_what_its_pattern_matches(play: Callable[[Scenario], None]) -> None:
    async def scenario(page: Running, addon: Answering) -> None:
        assert await page.json("/api/things?a=1&b=%20x&a=2") == {
            "path": [],
            "query": {"a": "2", "b": " x"},
            "body": {},
        }
        assert (await page.json("/api/things/a%2Fb%20c%3F"))["path"] == ["a/b c?", ""]
        assert (await page.json("/api/things/x/12"))["path"] == ["x", "12"]
        for path in ("/api/things/x/y", "/api/thingss", "/things", "/api/x/things"):
            assert (await page.get(path)).status_code == 404, path
        head = await page.client.head("/api/things", headers=BEARER)
        assert (head.status_code, head.content) == (200, b"")

    play(scenario)


def test_the_token_in_the_address_is_not_told_to_the_addon(
    play: Callable[[Scenario], None],
) -> None:
    async def scenario(page: Running, addon: Answering) -> None:
        answer = await page.client.get("/api/things", params={"token": TOKEN, "x": "y"})
        assert answer.status_code == 200
        assert addon.asked[-1].query == {"x": "y"}

    play(scenario)


def test_the_pages_own_addresses_cannot_be_taken(play: Callable[[Scenario], None]) -> None:
    async def scenario(page: Running, addon: Answering) -> None:
        assert await page.json("/api/sessions") == {"sessions": [], "next": None}
        assert addon.asked == []

    play(scenario)


def test_an_addon_that_has_left_answers_no_more(play: Callable[[Scenario], None]) -> None:
    async def scenario(page: Running, addon: Answering) -> None:
        assert (await page.get("/api/things")).status_code == 200
        flows.leave(addon)
        assert (await page.get("/api/things")).status_code == 404

    play(scenario)


def test_a_change_that_one_page_asked_for_wakes_the_others(
    play: Callable[[Scenario], None],
) -> None:
    async def scenario(page: Running, addon: Answering) -> None:
        async with page.client.stream("GET", "/api/events", headers=BEARER) as answer:
            lines = aiter(answer.aiter_lines())
            assert await anext(lines) == "retry: 2000"
            assert (await page.get("/api/things")).status_code == 200
            assert (await post(page, "/api/change")).status_code == 200
            async with asyncio.timeout(5):
                assert [await anext(lines) for _ in range(2)] == ["", "event: change"]

    play(scenario)


def test_a_post_brings_a_json_object_or_nothing(play: Callable[[Scenario], None]) -> None:
    async def scenario(page: Running, addon: Answering) -> None:
        answer = await post(page, "/api/things/one", b'{"force": true}', **JSON)
        assert answer.json() == {"path": ["one"], "query": {}, "body": {"force": True}}
        assert (await post(page, "/api/change")).json()["body"] == {}
        told = len(addon.asked)
        deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
        for body in (b"[1]", b"1", b"null", b'{"a": 1', b'{"a": NaN}', b"\xff", b"{} {}", deep):
            answer = await post(page, "/api/change", body, **JSON)
            assert answer.status_code == 400, body[:20]
            assert answer.json() == {"error": "the body is no JSON object"}
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""):
            answer = await post(page, "/api/change", b'{"a": 1}', **{"content-type": kind})
            assert answer.status_code == 415, kind
        assert len(addon.asked) == told

    play(scenario)


def test_a_body_of_more_than_a_megabyte_is_refused(play: Callable[[Scenario], None]) -> None:
    async def scenario(page: Running, addon: Answering) -> None:
        for size, taken in ((1024 * 1024, True), (1024 * 1024 + 1, False)):
            body = json.dumps({"a": "x" * (size - len('{"a": ""}'))}).encode()
            assert len(body) == size
            try:
                status = (await post(page, "/api/change", body, **JSON)).status_code
            except httpx.TransportError:  # it does not wait for the end of the body
                status = 400
            assert (status == 200) == taken
        assert len(addon.asked) == 1

    play(scenario)


def test_a_change_from_elsewhere_is_refused_before_the_addon_hears_of_it(
    play: Callable[[Scenario], None],
) -> None:
    async def scenario(page: Running, addon: Answering) -> None:
        ours = f"http://127.0.0.1:{page.port}"
        assert (await post(page, "/api/change", origin="https://evil.example")).status_code == 403
        assert (await post(page, "/api/change", host="evil.example")).status_code == 403
        assert (await page.client.post("/api/change")).status_code == 401
        await page.client.get("/", params={"token": TOKEN})  # the cookie
        assert (await page.client.post("/api/change")).status_code == 403
        for origin in ("null", "https://evil.example", f"{ours}.evil"):
            answer = await page.client.post("/api/change", headers={"origin": origin})
            assert answer.status_code == 403, origin
        assert addon.asked == []
        answer = await page.client.post("/api/change", headers={"origin": ours})
        assert answer.status_code == 200
        assert len(addon.asked) == 1

    play(scenario)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/api/things", "GET, HEAD"),
        ("PUT", "/api/things/x", "GET, HEAD, POST"),
        ("GET", "/api/change", "POST"),
        ("DELETE", "/api/change", "POST"),
        ("POST", "/api/sessions", "GET, HEAD"),
        ("PATCH", "/", "GET"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(
    play: Callable[[Scenario], None], method: str, path: str, allowed: str
) -> None:
    async def scenario(page: Running, addon: Answering) -> None:
        answer = await page.client.request(method, path, headers=BEARER)
        assert answer.status_code == 405
        assert answer.headers["allow"] == allowed
        assert "error" in answer.json()
        assert addon.asked == []

    play(scenario)


def test_what_an_addon_refuses_is_answered_with_its_own_words(
    play: Callable[[Scenario], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(page: Running, addon: Answering) -> None:
        answer = await page.get("/api/fails/known")
        assert answer.status_code == 400
        assert answer.json() == {"error": "too small", "current_percentage": 12.5, "hint": "wait"}
        answer = await page.get("/api/fails/store")
        assert (answer.status_code, answer.json()) == (503, {"error": "the file cannot be read"})

    play(scenario)
    assert [r for r in caplog.records if r.name.startswith("kimi_core")] == []


def test_an_addon_that_fails_is_a_500_without_details(
    play: Callable[[Scenario], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(page: Running, addon: Answering) -> None:
        for path in ("/api/fails/other", "/api/unsayable"):
            answer = await page.get(path)
            assert answer.status_code == 500
            assert answer.json() == {"error": "internal server error"}
        assert (await page.get("/api/things")).status_code == 200

    caplog.set_level(logging.WARNING)
    play(scenario)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("kimi_core.web")]
    assert len(said) == 2
    assert "RuntimeError" in said[0]
    assert "secret" not in "".join(said)


def test_an_original_that_is_no_unicode_arrives_as_it_was(play: Callable[[Scenario], None]) -> None:
    async def scenario(page: Running, addon: Answering) -> None:
        assert (await page.json("/api/odd"))["text"] == LONE

    play(scenario)


SCRIPT = """
from kimi_core import flows
from kimi_core.api import Endpoint


class Told:
    said = "first"

    def load(self, loader):
        flows.join(self, loader)

    def endpoints(self):
        return [
            Endpoint("GET", "told", lambda asked: {"said": self.said}, "What was said."),
            Endpoint("POST", "told", self.hear, "Say it."),
        ]

    async def hear(self, asked):
        self.said = asked.body["said"]
        return {}


addons = [Told()]
"""


def test_a_script_that_is_loaded_after_the_page_answers_in_a_running_proxy(
    tmp_path: Path, up: Upstream
) -> None:
    script, port = tmp_path / "told.py", free_port()
    script.write_text(SCRIPT)
    page = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=BEARER, trust_env=False)
    settings = [f"stats_port={port}", f"stats_token={TOKEN}"]
    with Proxy(tmp_path, up, scripts=("stats.py", str(script)), options=settings), page:

        def said() -> Any:
            try:
                return page.get("/api/told").json()
            except httpx.TransportError:
                return None

        assert wait_until(said) == {"said": "first"}
        assert page.post("/api/told", json={"said": "then"}).status_code == 200
        assert said() == {"said": "then"}
