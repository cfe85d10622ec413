"""The stats page over real sockets: who gets in, what the API answers, how it starts and ends."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import logging
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from mitmproxy import exceptions, options
from mitmproxy.test import tflow, tutils
from mitmproxy.tools.dump import DumpMaster

import stats
from kimi_core.report import gauge
from kimi_core.store import EXCHANGE_COLUMNS
from page import BEARER, PLANTED, RULES, TOKEN, Running, free_port, row, started

ALL_PATHS = (
    "/",
    "/app.js",
    "/elements.js",
    "/savings.js",
    "/style.css",
    "/icon.svg",
    "/health",
    "/api/status",
    "/api/sessions",
    "/api/sessions/active",
    "/api/sessions/one",
    "/api/exchanges",
    "/api/totals",
    "/api/providers",
    "/api/models",
    "/api/models/all",
    "/api/export/csv",
    "/api/export/json",
)
OPEN_PATHS = ("/app.js", "/elements.js", "/savings.js", "/style.css", "/icon.svg", "/health")
HOSTILE = "<img src=x onerror=alert(1)>\u202e\x1b[31m\"'&"


Scenario = Callable[[Running], Coroutine[Any, Any, None]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., None]:
    """Run a scenario against a started page."""

    def run(scenario: Scenario, **settings: Any) -> None:
        async def main() -> None:
            async with started(tmp_path, **settings) as running:
                await scenario(running)

        asyncio.run(main())

    return run


# --- who gets in ------------------------------------------------------------------------------


def test_without_the_right_token_nothing_private_is_told(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        page.add(row(1))
        wrong = (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": f"Basic {TOKEN}"},
            {"authorization": "Bearer"},
            {"authorization": ""},
            {"cookie": f"kimi-proxy-{page.port}={TOKEN}"},
            {"cookie": f"kimi-proxy-{page.port}=wrong"},
        )
        for path in set(ALL_PATHS) - set(OPEN_PATHS) | {"/api/events", "/no/such/path"}:
            for headers in wrong:
                answer = await page.client.get(path, headers=headers)
                assert answer.status_code == 401, (path, headers)
                assert "flow-0001" not in answer.text
            answer = await page.client.get(path, params={"token": "wrong\ud83d\udc7e"[:5]})
            assert answer.status_code == 401
        for path in OPEN_PATHS:
            assert (await page.client.get(path)).status_code == 200

    play(scenario)


def test_the_first_visit_brings_the_token_and_gets_a_cookie(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        gate = await page.client.get("/")
        assert 'name="token"' in gate.text
        first = await page.client.get("/", params={"token": TOKEN})
        assert first.status_code == 302
        assert first.headers["location"] == "/"
        cookie = first.headers["set-cookie"]
        assert cookie.startswith(f"kimi-proxy-{page.port}=")
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert TOKEN not in cookie
        assert "app.js" in (await page.client.get("/")).text
        assert (await page.client.get("/api/sessions")).status_code == 200

    play(scenario)


def test_the_token_opens_the_api_in_a_header_and_in_the_url(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        assert (await page.get("/api/sessions")).status_code == 200
        answer = await page.client.get("/api/sessions", params={"token": TOKEN})
        assert answer.status_code == 200

    play(scenario)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1",
        "127.0.0.1:1",
        "localhost.evil.example:{port}",
        "127.0.0.1:{port}@evil.example",
        "192.0.2.7:{port}",
        "127.0.0.1:{port}, evil.example",
        "",
    ],
)
def test_a_foreign_host_is_refused_whatever_the_token(play: Callable[..., None], host: str) -> None:
    async def scenario(page: Running) -> None:
        for path in ("/", "/health", "/app.js", "/api/sessions"):
            answer = await page.get(path, host=host.format(port=page.port))
            # tornado 6.5 itself answers 400 to what is no host name at all
            assert answer.status_code in ((400, 403) if set(host) & set("@,") else (403,))
            assert TOKEN not in answer.text
            assert "set-cookie" not in answer.headers

    play(scenario)


@pytest.mark.parametrize(
    "host", ["localhost:{port}", "LOCALHOST:{port}", "127.0.0.1:{port}", "[::1]:{port}"]
)
def test_the_names_of_loopback_are_ours(play: Callable[..., None], host: str) -> None:
    async def scenario(page: Running) -> None:
        answer = await page.get("/api/sessions", host=host.format(port=page.port))
        assert answer.status_code == 200

    play(scenario)


def test_hosts_named_by_the_option_are_ours(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        for host in ("box.lan", "box.lan:9999", "other.lan:9082"):
            assert (await page.get("/health", host=host)).status_code == 200
        assert (await page.get("/health", host="other.lan:9083")).status_code == 403

    play(scenario, kimi_hosts=["Box.lan", "other.lan:9082"])


def test_off_loopback_an_address_is_ours_and_a_name_is_not(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        assert (await page.get("/health", host=f"192.0.2.7:{page.port}")).status_code == 403
        page.addon.site.host = "192.0.2.1"  # as if it were listening there
        assert (await page.get("/health", host=f"192.0.2.7:{page.port}")).status_code == 200
        assert (await page.get("/health", host=f"evil.example:{page.port}")).status_code == 403

    play(scenario)


def test_another_sites_page_is_refused(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        ours = f"http://127.0.0.1:{page.port}"
        assert (await page.get("/api/sessions", origin=ours)).status_code == 200
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "", f"{ours}.evil"):
            for path in ("/", "/health", "/api/sessions", "/api/export/csv"):
                answer = await page.get(path, origin=origin)
                assert answer.status_code == 403, (origin, path)

    play(scenario)


def test_a_change_needs_the_same_origin_or_the_token_itself(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        await page.client.get("/", params={"token": TOKEN})  # the cookie
        ours = {"origin": f"http://127.0.0.1:{page.port}"}
        assert (await page.client.post("/api/sessions")).status_code == 403
        assert (await page.client.post("/api/sessions", headers=ours)).status_code == 405
        page.client.cookies.clear()
        assert (await page.client.post("/api/sessions", headers=ours)).status_code == 401
        assert (await page.client.post("/api/sessions", headers=BEARER)).status_code == 405

    play(scenario)


def test_every_answer_carries_the_security_headers(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        page.add(row(1))
        for path in (*ALL_PATHS, "/no/such/path", "/api/sessions?limit=x"):
            for headers in (BEARER, {}, {**BEARER, "host": "evil.example"}):
                answer = await page.client.get(path, headers=headers)
                policy = answer.headers["content-security-policy"]
                assert "default-src 'self'" in policy
                assert "frame-ancestors 'none'" in policy
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert answer.headers["referrer-policy"] == "no-referrer"
                assert "server" not in answer.headers
                if path.startswith("/api"):
                    assert answer.headers["cache-control"] == "no-store"

    play(scenario)


def test_a_key_is_in_no_answer_and_the_token_in_no_log(
    play: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(page: Running) -> None:
        page.add(row(1))
        for path in ALL_PATHS:
            answer = await page.get(path)
            assert answer.status_code == 200, path
            assert PLANTED not in answer.text
        for path in ("/", "/api/nothing", "/api/sessions/nobody"):
            await page.client.get(path, params={"token": TOKEN})

    caplog.set_level(logging.DEBUG)
    play(scenario)
    ours = our_log(caplog)
    assert TOKEN not in ours
    assert PLANTED not in ours


def our_log(caplog: pytest.LogCaptureFixture) -> str:
    """What was logged, but by the client, which tells every URL."""
    return "\n".join(
        entry.getMessage()
        for entry in caplog.records
        if not entry.name.startswith(("httpx", "httpcore"))
    )


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as a warning or worse, but by asyncio's debug mode, which times tests."""
    return [
        entry.getMessage()
        for entry in caplog.records
        if entry.levelno >= logging.WARNING and entry.name != "asyncio"
    ]


# --- the API ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "window", "percentage", "color"),
    [
        (0, 1000, 0.0, "green"),
        (499, 1000, 49.9, "green"),
        (49_999, 100_000, 50.0, "green"),
        (500, 1000, 50.0, "yellow"),
        (799, 1000, 79.9, "yellow"),
        (800, 1000, 80.0, "red"),
        (1500, 1000, 150.0, "red"),
        (None, 1000, None, None),
        (10, None, None, None),
        (10, 0, None, None),
    ],
)
def test_the_gauge_is_yellow_from_half_and_red_from_four_fifths(
    tokens: int | None, window: int | None, percentage: float | None, color: str | None
) -> None:
    used = gauge({"context_tokens": tokens, "context_window": window})
    assert used == {
        "tokens": tokens,
        "window": window,
        "percentage": percentage,
        "color": color,
    }


def test_health_needs_no_token_and_names_nobody(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        empty = (await page.client.get("/health")).json()
        assert empty["session"] == {"state": "none", "percentage": None, "color": None}
        page.add(row(999, session_id="secret-session", **{"gen_ai.usage.input_tokens": 900}))
        answer = await page.client.get("/health")
        assert answer.json() == {
            "status": "ok",
            "version": page.addon.site.version,
            "live_exchanges": 0,
            "session": {"state": "active", "percentage": 90.0, "color": "red"},
            "store": {"state": "ok", "dropped": 0},
            "log_watcher": None,
            "rate_limit": None,
        }
        assert page.addon.site.version
        assert (await page.client.head("/health")).status_code == 200

    play(scenario)


def test_a_session_of_yesterday_is_idle(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        then = time.time() - 86400
        page.add(row(1, started_at=then, ended_at=then))
        assert (await page.client.get("/health")).json()["session"]["state"] == "idle"

    play(scenario)


def test_a_broken_store_is_told_and_the_page_stays(
    play: Callable[..., None], tmp_path: Path
) -> None:
    async def scenario(page: Running) -> None:
        health = (await page.client.get("/health")).json()
        assert health["status"] == "degraded"
        assert health["store"]["state"] == "broken"
        assert health["session"]["state"] == "unknown"
        assert str(tmp_path) not in json.dumps(health)
        for path in ("/api/sessions", "/api/exchanges", "/api/totals", "/api/export/csv"):
            answer = await page.get(path)
            assert answer.status_code == 503
            assert "cannot be read" in answer.json()["error"]
        assert (await page.get("/")).status_code == 200

    play(scenario, kimi_store=str(tmp_path))


def test_sessions_come_last_used_first_with_their_gauge(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        assert await page.json("/api/sessions") == {"sessions": [], "next": None}
        assert await page.json("/api/sessions/active") == {"session": None}
        names = ["a/b c?", "two", "three"]
        page.add(*(row(n, session_id=name) for n, name in enumerate(names)))
        page.add(row(9, session_id="two", **{"gen_ai.usage.input_tokens": 600}))
        listed = (await page.json("/api/sessions"))["sessions"]
        assert [entry["id"] for entry in listed] == ["two", "three", "a/b c?"]
        assert listed[0]["gauge"] == {
            "tokens": 600,
            "window": 1000,
            "percentage": 60.0,
            "color": "yellow",
        }
        assert (await page.json("/api/sessions/active"))["session"] == listed[0]
        assert (await page.json("/api/sessions/a%2Fb%20c%3F"))["session"] == listed[2]
        first = await page.json("/api/sessions?limit=2")
        assert first["next"] == "three"
        rest = await page.json("/api/sessions?limit=2&before=three")
        assert [entry["id"] for entry in rest["sessions"]] == ["a/b c?"]
        assert rest["next"] is None

    play(scenario)


def test_a_session_of_which_all_was_refused_is_not_the_active_one(
    play: Callable[..., None],
) -> None:
    async def active(page: Running) -> Any:
        session = (await page.json("/api/sessions/active"))["session"]
        return session and session["id"]

    async def scenario(page: Running) -> None:
        page.add(row(1, session_id="refused", status=404, attempts=0))
        assert await active(page) is None
        assert (await page.client.get("/health")).json()["session"]["state"] == "none"
        page.add(row(2, session_id="talk", attempts=1))
        page.add(row(3, session_id="refused", status=404, attempts=0))
        assert await active(page) == "talk"
        assert (await page.json("/api/sessions"))["sessions"][0]["id"] == "refused"
        page.add(row(4, session_id="refused", status=502, attempts=1))
        assert await active(page) == "refused"
        page.store.touch_session("begins")
        assert page.store.flush()
        assert await active(page) == "begins"

    play(scenario)


def test_what_has_no_known_price_is_counted_where_its_money_is_missing(
    play: Callable[..., None],
) -> None:
    nothing = {"masks": 0, "gross_saved_usd": 0.0, "lost_usd": 0.0, "spent_usd": 0.0}

    async def scenario(page: Running) -> None:
        page.add(
            row(1),  # of an older schema
            row(2, **nothing),
            row(3, **nothing | {"spent_usd": None}),
            row(4, **nothing | {"spent_usd": None, "gen_ai.usage.input_tokens": None}),
            row(5, **nothing | {"gross_saved_usd": None, "lost_usd": None}),
            # Nobody counted.
            row(6, **dict.fromkeys(nothing) | {"masks": 0, "gen_ai.usage.input_tokens": None}),
        )
        sums = (await page.json("/api/totals"))["all"]
        assert (sums["unpriced_savings"], sums["unpriced_spendings"]) == (1, 2)

    play(scenario)


def test_exchanges_come_newest_first_page_by_page(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        page.add(*(row(n, session_id="two" if n % 2 else "one") for n in range(5)))
        first = await page.json("/api/exchanges?limit=2")
        assert [entry["id"] for entry in first["exchanges"]] == ["flow-0004", "flow-0003"]
        assert tuple(first["exchanges"][0]) == EXCHANGE_COLUMNS
        second = await page.json(f"/api/exchanges?limit=3&before={first['next']}")
        assert [entry["id"] for entry in second["exchanges"]] == [f"flow-000{n}" for n in (2, 1, 0)]
        of_two = await page.json("/api/exchanges?session=two")
        assert [entry["id"] for entry in of_two["exchanges"]] == ["flow-0003", "flow-0001"]
        assert of_two["next"] is None

    play(scenario)


@pytest.mark.parametrize(
    ("path", "status", "about"),
    [
        ("/api/exchanges?limit=0", 400, "limit"),
        ("/api/exchanges?limit=1001", 400, "limit"),
        ("/api/exchanges?limit=-1", 400, "limit"),
        ("/api/sessions?limit=%D9%A1", 400, "limit"),
        ("/api/sessions?before=nobody", 400, "before"),
        ("/api/sessions/nobody", 404, "session"),
        ("/api/totals?period=week", 400, "period"),
        ("/api/export/xml", 404, "address"),
        ("/api/nothing", 404, "address"),
        ("/../stats.py", 404, "address"),
        ("/token.html", 404, "address"),
        ("/%00", 404, "address"),
    ],
)
def test_a_wrong_question_gets_a_json_error(
    play: Callable[..., None], path: str, status: int, about: str
) -> None:
    async def scenario(page: Running) -> None:
        answer = await page.get(path)
        assert answer.status_code == status
        assert about in answer.json()["error"]
        assert answer.headers["content-type"].startswith("application/json")

    play(scenario)


def test_totals_tell_today_from_always(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        earlier = time.time() - 3 * 86400
        now = time.time()
        page.add(
            row(1, started_at=earlier, ended_at=earlier),
            row(2, started_at=now, ended_at=now),
            row(3, started_at=now, ended_at=now, session_id="two", cost_usd=float("inf")),
        )
        totals = await page.json("/api/totals")
        assert totals["all"]["requests"] == 3
        assert totals["all"]["input_tokens"] == 300
        assert totals["today"]["requests"] == 2
        assert totals["by_provider"]["openai"]["requests"] == 3
        assert totals["by_model"]["gpt-4o-mini"]["output_tokens"] == 30
        assert len(totals["by_day"]) == 2
        assert "by_day" not in totals["today"]
        only = await page.json("/api/totals?period=today&session=one")
        assert list(only) == ["today"]
        assert only["today"]["cost_usd"] == 0.5

    play(scenario)


def test_providers_say_whether_there_is_a_key_and_what_was_used(
    play: Callable[..., None],
) -> None:
    async def scenario(page: Running) -> None:
        page.add(row(1), row(2, **{"gen_ai.provider.name": "unknown.example"}))
        listed = (await page.json("/api/providers"))["providers"]
        found = {entry["name"]: entry for entry in listed}
        assert list(found) == ["openai", "local", "keyless", "unknown.example"]
        seen = found["openai"].pop("seen")
        assert (seen["requests"], seen["input_tokens"], seen["cost_usd"]) == (1, 100, 0.5)
        assert found["openai"] == {
            "name": "openai",
            "configured": True,
            "dialects": ["openai"],
            "host": "api.openai.com",
            "has_key": True,
            "takes_key": True,
            "rpm": 40,
            "timeout_s": 90,
            "problem": None,
        }
        assert found["local"]["host"] == "127.0.0.1:11434"
        assert (found["local"]["has_key"], found["local"]["takes_key"]) == (False, False)
        assert (found["keyless"]["has_key"], found["keyless"]["takes_key"]) == (False, True)
        assert found["keyless"]["seen"] is None
        assert found["unknown.example"]["configured"] is False

    play(scenario)


def test_mended_replies_are_counted_today_and_always_per_provider(
    play: Callable[..., None],
) -> None:
    async def scenario(page: Running) -> None:
        then = time.time() - 3 * 86400
        local = {"gen_ai.provider.name": "local", "started_at": time.time()}
        page.add(
            row(1, started_at=time.time(), mended=3, attempts=2),
            row(2, started_at=time.time(), mended=0),
            row(3, started_at=then, ended_at=then, mended=1),
            row(4, **local),
        )
        totals = await page.json("/api/totals")
        assert (totals["today"]["mended"], totals["all"]["mended"]) == (1, 2)
        for named, expected in (
            (totals["today"]["by_provider"], {"local": 0, "openai": 1}),
            (totals["by_provider"], {"local": 0, "openai": 2}),
            (totals["by_model"], {"gpt-4o-mini": 2}),
        ):
            assert {name: sums["mended"] for name, sums in named.items()} == expected
        assert sorted(sums["mended"] for sums in totals["by_day"].values()) == [1, 1]
        listed = (await page.json("/api/providers"))["providers"]
        seen = {entry["name"]: entry["seen"] for entry in listed}
        assert (seen["openai"]["mended"], seen["local"]["mended"]) == (2, 0)
        rows = (await page.json("/api/exchanges"))["exchanges"]
        shown = {entry["id"]: (entry["mended"], entry["attempts"]) for entry in rows}
        assert (shown["flow-0001"], shown["flow-0004"]) == ((3, 2), (None, None))

    play(scenario)


def test_models_are_those_of_the_rules_and_those_seen(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        page.add(row(1), row(2), row(3, **{"gen_ai.response.model": "stranger"}))
        answer = await page.json("/api/models")
        assert answer["default_model"] == "small"
        assert answer["models"] == [
            {
                "name": "small",
                "pattern": False,
                "context": 1000,
                "strategy": "first",
                "targets": [
                    {"provider": "openai", "model": "gpt-4o-mini"},
                    {"provider": "local", "model": "small"},
                ],
            }
        ]
        seen = {entry["name"]: entry for entry in answer["seen"]}
        assert list(seen) == ["stranger", "gpt-4o-mini"]
        assert seen["gpt-4o-mini"]["requests"] == 2
        assert seen["gpt-4o-mini"]["providers"] == ["openai"]
        assert seen["gpt-4o-mini"]["input_tokens"] == 200
        every = (await page.json("/api/models/all"))["models"]
        assert [
            (entry["provider"], entry["model"], entry["context"], entry["requests"])
            for entry in every
        ] == [
            ("openai", "gpt-4o-mini", 1000, 2),
            ("local", "small", 1000, 0),
            ("openai", "stranger", None, 1),
        ]

    play(scenario)


def test_hostile_names_arrive_as_they_were(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        page.add(
            row(
                1,
                session_id=HOSTILE,
                client=HOSTILE,
                error_type=HOSTILE,
                **{"gen_ai.request.model": HOSTILE, "gen_ai.response.model": HOSTILE},
                **{"gen_ai.provider.name": HOSTILE},
            )
        )
        exchange = (await page.json("/api/exchanges"))["exchanges"][0]
        assert exchange["gen_ai.request.model"] == HOSTILE
        assert (await page.json("/api/sessions/active"))["session"]["id"] == HOSTILE
        assert (await page.json("/api/models"))["seen"][0]["name"] == HOSTILE
        answer = await page.get("/api/sessions", accept="text/html")
        assert answer.headers["content-type"].startswith("application/json")

    play(scenario)


def test_the_page_runs_no_markup_and_fetches_nothing_from_elsewhere() -> None:
    scripts = sorted(stats.PAGE.glob("*.js"))
    assert len(scripts) == 3
    for script in scripts:
        for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert sink not in script.read_text(), script
    for file in stats.PAGE.iterdir():
        found = re.findall(r"""https?://[\w.-]+|["'(]//[\w.-]+""", file.read_text())
        assert set(found) <= {"http://www.w3.org"}, file
    for name in ("index.html", "token.html"):
        markup = (stats.PAGE / name).read_text()
        assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?! type=\"module\" src=)", markup)


def test_the_pages_files_are_served_and_revalidated(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        markup = (await page.get("/")).text
        script = (stats.PAGE / "app.js").read_text()
        named = re.findall(r'(?:src|href)="([\w.]+)"', markup)
        named += re.findall(r'from "\./([\w.]+)"', script)
        assert len(named) == 5
        for name in named:
            answer = await page.client.get(f"/{name}")
            assert answer.status_code == 200, name
            assert answer.content == (stats.PAGE / name).read_bytes()
            again = await page.client.get(
                f"/{name}", headers={"if-none-match": answer.headers["etag"]}
            )
            assert again.status_code == 304

    play(scenario)


# --- exports ----------------------------------------------------------------------------------


def test_exports_carry_the_stores_columns_and_rows(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        page.add(*(row(n, session_id="two" if n == 3 else "one") for n in range(3000)))
        page.add(row(3000, client="=cmd()", project='a "quoted",\nline'))
        expected = list(page.store.export())
        as_json = await page.get("/api/export/json")
        assert as_json.json() == expected
        assert as_json.headers["transfer-encoding"] == "chunked"
        assert 'filename="kimi-proxy-exchanges.json"' in as_json.headers["content-disposition"]
        as_csv = await page.get("/api/export/csv")
        assert as_csv.headers["content-type"] == "text/csv; charset=utf-8"
        assert as_csv.headers["content-disposition"].startswith("attachment;")
        rows = list(csv.DictReader(io.StringIO(as_csv.text, newline="")))
        assert tuple(rows[0]) == EXCHANGE_COLUMNS
        assert [entry["id"] for entry in rows] == [entry["id"] for entry in expected]
        assert rows[-1]["client"] == "'=cmd()"
        assert rows[-1]["project"] == 'a "quoted",\nline'
        of_two = (await page.get("/api/export/json?session=two")).json()
        assert [entry["id"] for entry in of_two] == ["flow-0003"]
        nothing = await page.get("/api/export/csv?session=nobody")
        assert nothing.text.strip() == ",".join(EXCHANGE_COLUMNS)

    play(scenario)


def test_a_client_that_leaves_an_export_stops_it(
    play: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(page: Running) -> None:
        page.add(*(row(n, client="x" * 2000) for n in range(5000)))
        async with page.client.stream("GET", "/api/export/json", headers=BEARER) as answer:
            await anext(answer.aiter_bytes())
        assert (await page.json("/api/totals"))["all"]["requests"] == 5000

    play(scenario)
    assert warnings(caplog) == []


# --- live events ------------------------------------------------------------------------------


def ended_flow() -> Any:
    body = json.dumps({"model": "small", "messages": [{"role": "user", "content": "hi"}]})
    request = tutils.treq(
        method=b"POST",
        scheme=b"https",
        host="api.openai.com",
        port=443,
        path=b"/v1/chat/completions",
        content=body.encode(),
    )
    return tflow.tflow(req=request, resp=True)


async def next_change(lines: AsyncIterator[str]) -> None:
    async with asyncio.timeout(5):
        async for line in lines:
            if line == "event: change":
                return
    raise AssertionError("the stream ended")


def test_an_ended_exchange_wakes_the_page_when_its_row_can_be_read(
    play: Callable[..., None],
) -> None:
    async def scenario(page: Running) -> None:
        async with page.client.stream("GET", "/api/events", headers=BEARER) as answer:
            assert answer.headers["content-type"] == "text/event-stream"
            lines = aiter(answer.aiter_lines())
            assert await anext(lines) == "retry: 2000"
            for number in range(2):
                page.store.add_exchange(row(number))
                flow = ended_flow()
                page.addon.response(flow)
                await next_change(lines)
                newest = (await page.json("/api/exchanges"))["exchanges"][0]
                assert newest["id"] == f"flow-000{number}"
            failed = tflow.tflow(req=ended_flow().request, err=True)
            page.addon.error(failed)
            await next_change(lines)

    play(scenario)


def test_with_no_page_open_an_exchange_starts_nothing(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        before = asyncio.all_tasks()
        page.addon.response(ended_flow())
        assert asyncio.all_tasks() == before

    play(scenario)


def test_what_an_addon_announces_wakes_the_page_when_its_rows_can_be_read(
    play: Callable[..., None],
) -> None:
    async def scenario(page: Running) -> None:
        suite = page.addon.proxy.suite
        before = asyncio.all_tasks()
        suite.announce()  # with no page open it costs nothing
        assert asyncio.all_tasks() == before
        async with page.client.stream("GET", "/api/events", headers=BEARER) as answer:
            lines = aiter(answer.aiter_lines())
            assert await anext(lines) == "retry: 2000"
            page.store.add_exchange(row(1))
            suite.announce()
            await next_change(lines)
            assert len((await page.json("/api/exchanges"))["exchanges"]) == 1

    play(scenario)


def test_an_option_that_is_set_elsewhere_wakes_the_page(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        async with page.client.stream("GET", "/api/events", headers=BEARER) as answer:
            lines = aiter(answer.aiter_lines())
            assert await anext(lines) == "retry: 2000"
            page.context.options.kimi_bypass = True
            await next_change(lines)

    play(scenario)


def test_when_the_page_has_ended_what_is_announced_is_heard_by_nobody(
    play: Callable[..., None],
) -> None:
    async def scenario(page: Running) -> None:
        suite = page.addon.proxy.suite
        await page.addon.done()
        assert suite.on_change is None
        suite.announce()

    play(scenario)


def test_a_page_that_is_closed_is_forgotten(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        async with page.client.stream("GET", "/api/events", headers=BEARER) as answer:
            await anext(answer.aiter_lines())
            assert page.addon.site.listeners == 1
        async with asyncio.timeout(5):
            while page.addon.site.listeners:
                await page.client.get("/health")

    play(scenario)


# --- how it starts and ends -------------------------------------------------------------------


def test_a_taken_port_is_one_warning_and_no_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", free_port()))
            other.listen()
            port = other.getsockname()[1]
            async with started(tmp_path, stats_port=port) as page:
                flow = ended_flow()
                page.addon.response(flow)
                assert flow.response.status_code == 200

    asyncio.run(main())
    (warning,) = warnings(caplog)
    assert "stats_port" in warning


def test_an_address_that_is_not_ours_is_one_warning(
    play: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(page: Running) -> None:
        with pytest.raises(httpx.ConnectError):
            await page.client.get("/health")

    play(scenario, stats_host="192.0.2.1")
    (warning,) = warnings(caplog)
    assert "192.0.2.1" in warning


def test_port_0_turns_the_page_off(
    play: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(page: Running) -> None:
        page.addon.response(ended_flow())

    caplog.set_level(logging.INFO)
    play(scenario, stats_port=0)
    assert "Stats page" not in caplog.text


def test_an_impossible_port_is_refused(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        raise AssertionError("it started")

    with pytest.raises(exceptions.OptionsError, match="stats_port is 70000"):
        play(scenario, stats_port=70000)


def test_the_port_can_be_changed_while_it_runs(play: Callable[..., None]) -> None:
    async def scenario(page: Running) -> None:
        assert (await page.get("/health")).status_code == 200
        port = free_port()
        page.context.configure(page.addon, stats_port=port)
        async with asyncio.timeout(5):
            while not await answers(page.client, f"http://127.0.0.1:{port}/health"):
                pass
        with pytest.raises(httpx.ConnectError):
            await page.get("/health")

    play(scenario)


async def answers(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).status_code == 200
    except httpx.TransportError:
        await asyncio.to_thread(lambda: None)  # let the server come up
        return False


def test_a_random_token_is_printed_once_in_the_address(
    play: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(page: Running) -> None:
        (printed,) = re.findall(r"http://\S+", our_log(caplog))
        assert re.fullmatch(rf"http://127\.0\.0\.1:{page.port}/\?token=[\w-]{{43}}", printed)
        assert (await page.client.get(printed, follow_redirects=True)).status_code == 200

    caplog.set_level(logging.INFO)
    play(scenario, stats_token="")
    assert our_log(caplog).count("token=") == 1


def test_it_stops_at_once_with_a_page_open_and_an_export_under_way(tmp_path: Path) -> None:
    async def main() -> float:
        async with started(tmp_path) as page:
            page.add(*(row(n, client="x" * 4000) for n in range(5000)))
            reader, writer = await asyncio.open_connection("127.0.0.1", page.port)
            writer.write(
                f"GET /api/export/json HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\n"
                f"Authorization: Bearer {TOKEN}\r\n\r\n".encode()
            )
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"  # and reads no further
            async with page.client.stream("GET", "/api/events", headers=BEARER) as answer:
                await anext(answer.aiter_lines())
                begin = time.monotonic()
                await page.addon.done()
                duration = time.monotonic() - begin
            writer.close()
        return duration

    begin = time.monotonic()
    duration = asyncio.run(main())
    assert duration < 1
    assert time.monotonic() - begin < 10  # no thread was left waiting


def test_as_a_script_it_starts_reloads_and_ends_with_the_proxy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    settings = {
        "kimi_rules": str(rules),
        "kimi_store": str(tmp_path / "kimi.db"),
        "stats_port": port,
        "stats_token": TOKEN,
    }

    async def main() -> float:
        master = DumpMaster(
            options.Options(confdir=str(tmp_path), listen_host="127.0.0.1", listen_port=0),
            with_termlog=False,
            with_dumper=False,
        )
        master.options.update_defer(scripts=[str(Path(stats.__file__))], **settings)
        running = asyncio.create_task(master.run())
        url = f"http://127.0.0.1:{port}/api/status"
        async with httpx.AsyncClient(trust_env=False, headers=BEARER) as client:
            async with asyncio.timeout(10):
                while not await answers(client, url):
                    assert not running.done()
            status = (await client.get(url)).json()
            assert [place["host"] for place in status["listening"]] == ["127.0.0.1"]
            (script,) = master.addons.get("scriptloader").addons
            script.loadscript()  # what mitmproxy does when the file was changed
            async with asyncio.timeout(10):
                while not await answers(client, url):
                    assert not running.done()
            async with client.stream("GET", url.replace("status", "events")) as answer:
                await anext(answer.aiter_lines())
                begin = time.monotonic()
                master.shutdown()
                await running
        return time.monotonic() - begin

    assert asyncio.run(main()) < 2
    assert warnings(caplog) == []
