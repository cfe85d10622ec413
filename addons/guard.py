"""Decrypt LLM hosts only, keep proxied clients out of our own ports, keep secrets out of flows."""

import asyncio
import ipaddress
import logging
import re
import socket
from collections.abc import Awaitable
from urllib.parse import urlsplit

from mitmproxy import ctx, http, tls
from mitmproxy.addonmanager import Loader
from mitmproxy.connection import Client
from mitmproxy.proxy import layers, server_hooks
from mitmproxy.proxy.layer import NextLayer

from kimi_core import flows
from kimi_core.flows import Rank
from kimi_core.keys import SECRET_HEADERS

logger = logging.getLogger(__name__)

REDACTED = b"***"
_KEY_IN_QUERY = re.compile(r"(?<=[?&])((?:api_)?key|access_token)=[^&]*")
_TLS_HANDSHAKE = 0x16


class Guard:
    """Decides what a flow may do at all.

    On the way in: hosts that are no provider's are tunnelled unread; a connection to one of
    our own ports, and a web page's request to the proxy, are refused. As soon as the
    provider has the request, keys are taken out of the flow, so that neither mitmweb nor a saved
    file holds them.
    """

    def load(self, loader: Loader) -> None:
        flows.join(self, loader)

    def configure(self, updated: set[str]) -> None:
        flows.suite().configure(updated)

    def done(self) -> Awaitable[None]:
        return flows.leave(self)

    def client_connected(self, client: Client) -> None:
        mode = client.proxy_mode
        told = ctx.options.listen_host not in ("", flows.LOOPBACK) or mode.custom_listen_host
        if not told and not _is_local(str(client.peername[0])):
            client.error = "kimi-proxy serves this machine only; --listen-host opens it to others"
            logger.warning("Turned away %s: %s", client.peername[0], client.error)

    def tls_clienthello(self, data: tls.ClientHelloData) -> None:
        address = data.context.server.address
        if address is None:  # https:// to our own port: there is no other destination
            return
        if not _decrypts(address[0], data.client_hello.sni):
            data.ignore_connection = True

    def next_layer(self, data: NextLayer) -> None:
        address = data.context.server.address
        if address is None or data.context.client.tls or _decrypts(address[0], None):
            return
        if data.data_client()[:1] not in (b"", bytes([_TLS_HANDSHAKE])):
            # Not TLS, and no provider's host: whatever it is, it is not ours to read.
            data.layer = layers.TCPLayer(data.context, ignore=True)

    async def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        address = data.server.address
        if address is None or flows.leads_to_relay(data.server):
            return
        if flows.names_relay(address[0]):
            data.server.error = "kimi-proxy's relay serves kimi-proxy alone"
            logger.warning("Refused a connection to a host name of the relay")
            return
        if address[1] not in _own_ports(data):
            return
        host, port = address[0], address[1]
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )
        except OSError as error:
            data.server.error = f"{host} cannot be resolved: {error.strerror}"
            return
        addresses = [str(entry[4][0]) for entry in found]
        if any(_is_local(ip) for ip in addresses):
            data.server.error = f"kimi-proxy does not connect to its own port {port}"
            logger.warning("Refused a connection to our own port %s", port)
            return
        # What was checked is what is connected to: a second look-up may answer otherwise.
        data.server.address = (addresses[0], port, *address[2:])

    @flows.step(Rank.ADMIT)
    @flows.fail_closed
    def request(self, flow: http.HTTPFlow) -> None:
        if not flows.for_us(flow):
            return
        origin = flows.client_header(flow, "origin")
        site = flows.client_header(flow, "sec-fetch-site")
        foreign = bool(origin) and not flows.is_our_host(urlsplit(origin).hostname or "")
        if foreign or site == "cross-site":
            flows.refuse(
                flow, 403, "A web page of another origin may not use kimi-proxy.", "forbidden"
            )

    @flows.step(Rank.ADMIT)
    @flows.fail_open
    def responseheaders(self, flow: http.HTTPFlow) -> None:
        self._redact(flow)

    @flows.step(Rank.ADMIT)
    @flows.fail_open
    def response(self, flow: http.HTTPFlow) -> None:
        self._redact_reply(flow)

    @flows.step(Rank.ADMIT)
    @flows.fail_open
    def error(self, flow: http.HTTPFlow) -> None:
        self._redact(flow)
        self._redact_reply(flow)

    def _redact(self, flow: http.HTTPFlow) -> None:
        """Take the keys out of the request, which the provider has by now."""
        secrets: list[bytes] = []
        fields: list[tuple[bytes, bytes]] = []
        for name, value in flow.request.headers.fields:
            if name.lower() in SECRET_HEADERS:
                scheme, blank, token = value.partition(b" ")
                secrets.append(token if blank else value)
                value = scheme + b" " + REDACTED if blank else REDACTED
            fields.append((name, value))
        if secrets:
            flow.request.headers.fields = tuple(fields)
        if "=" in flow.request.path:
            for match in _KEY_IN_QUERY.finditer(flow.request.path):
                secrets.append(match.group().partition("=")[2].encode())
            flow.request.path = _KEY_IN_QUERY.sub(r"\1=***", flow.request.path)
        flows.remember_secrets(flow, tuple(secret for secret in secrets if len(secret) >= 8))

    def _redact_reply(self, flow: http.HTTPFlow) -> None:
        """Take keys out of a reply that repeats them, as error messages of providers do."""
        response = flow.response
        if response is None:
            return
        for secret in flows.secrets_of(flow):
            # Compressed or not; what cannot be decoded is searched as it is.
            content = response.get_content(strict=False) or b""
            if secret in content:
                content = content.replace(secret, REDACTED)
                if flows.is_streamed(flow):  # the client has it; this is what is shown and saved
                    response.headers.pop("content-encoding", None)
                    response.data.content = content
                else:
                    response.content = content
            if any(secret in value for _, value in response.headers.fields):
                response.headers.fields = tuple(
                    (name, value.replace(secret, REDACTED))
                    for name, value in response.headers.fields
                )


def _decrypts(host: str, sni: str | None) -> bool:
    """Tell whether a connection to `host` is a provider's; an address counts by its SNI."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return flows.is_llm_host(host)
    return flows.is_llm_host(host) or (bool(sni) and flows.is_llm_host(str(sni)))


def _own_ports(data: server_hooks.ServerConnectionHookData) -> set[int]:
    ports = {ctx.options.listen_port or 8080}
    if data.client.sockname:
        ports.add(data.client.sockname[1])
    if relay_port := flows.relay_port():
        ports.add(relay_port)
    for name in ("web_port", "stats_port"):
        if name in ctx.options and (port := getattr(ctx.options, name)):
            ports.add(port)
    return ports


def _is_local(ip: str) -> bool:
    """Tell whether an address is one of this machine's: only those can be bound."""
    address = ipaddress.ip_address(ip.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None) or address
    if mapped.is_loopback or mapped.is_unspecified:
        return True
    family = socket.AF_INET6 if mapped.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(mapped), 0))
        except OSError:
            return False
    return True


addons = [Guard()]
