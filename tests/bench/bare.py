"""Mitmdump with what everybody needs who puts it before a model: streams, and a base URL."""

from mitmproxy import ctx, http
from mitmproxy.addonmanager import Loader


def load(loader: Loader) -> None:
    loader.add_option("bench_provider", int, 0, "Port of the provider.")


def request(flow: http.HTTPFlow) -> None:
    if flow.request.port == flow.client_conn.sockname[1]:
        flow.request.host, flow.request.port = "127.0.0.1", ctx.options.bench_provider


def responseheaders(flow: http.HTTPFlow) -> None:
    assert flow.response
    if flow.response.headers.get("content-type", "").startswith("text/event-stream"):
        flow.response.stream = True
