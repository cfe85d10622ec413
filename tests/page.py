"""A stats page that was started, and a client of it."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from mitmproxy import options
from mitmproxy.test import taddons

from kimi_core.store import Store
from stats import Stats

TOKEN = "a-token"
PLANTED = "sk-planted-0123456789abcdef"
BEARER = {"authorization": f"Bearer {TOKEN}"}
RULES = """\
version: 1
providers:
  openai:
    api: openai
    base_url: "https://api.openai.com/v1"
    key: "${PLANTED_KEY}"
    rpm: 40
    timeout: 90
  local: {api: openai, base_url: "http://127.0.0.1:11434/v1"}
  keyless: {api: anthropic, base_url: "https://api.anthropic.com/v1", key: "${NO_SUCH_KEY}"}
models:
  small: {context: 1000, targets: [{provider: openai, model: gpt-4o-mini}, {provider: local}]}
default_model: small
"""


def free_port() -> int:
    """Return a free port that the system gives to no outgoing connection in the meantime."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def row(number: int, **more: Any) -> dict[str, Any]:
    return {
        "id": f"flow-{number:04}",
        "session_id": "one",
        "started_at": time.time() - 1000 + number,
        "ended_at": time.time() - 999 + number,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "small",
        "gen_ai.response.model": "gpt-4o-mini",
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 10,
        "input_source": "usage",
        "output_source": "estimate",
        "context_window": 1000,
        "cost_usd": 0.5,
        "status": 200,
        "kind": "turn",
    } | more


class Running:
    """A started page, a client of it, and the store behind it."""

    def __init__(self, addon: Stats, context: taddons.context, client: httpx.AsyncClient) -> None:
        self.addon = addon
        self.context = context
        self.client = client
        self.port: int = context.options.stats_port
        self.store: Store = addon.proxy.store

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.client.get(path, headers=BEARER | headers)

    async def json(self, path: str) -> Any:
        answer = await self.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def add(self, *rows: dict[str, Any]) -> None:
        for entry in rows:
            self.store.add_exchange(entry)
        assert self.store.flush()


@asynccontextmanager
async def started(tmp_path: Path, **settings: Any) -> AsyncIterator[Running]:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    (tmp_path / ".env").write_text(f"PLANTED_KEY={PLANTED}\n")
    addon = Stats()
    context = taddons.context(
        addon, options=options.Options(confdir=str(tmp_path), listen_host="127.0.0.1")
    )
    values = {
        "kimi_rules": str(rules),
        "kimi_store": str(tmp_path / "kimi.db"),
        "stats_port": free_port(),
        "stats_token": TOKEN,
    }
    with context:
        context.configure(addon, **(values | settings))
        await addon.running()
        base = f"http://127.0.0.1:{context.options.stats_port}"
        async with httpx.AsyncClient(base_url=base, trust_env=False, timeout=10) as client:
            try:
                yield Running(addon, context, client)
            finally:
                await addon.done()
