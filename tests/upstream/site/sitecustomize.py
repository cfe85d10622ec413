"""Lead a Python process's connections to the providers' names to the fake provider.

Python imports this by itself when the folder is on PYTHONPATH (`mitmdump -s` takes it too). It
works on the process's view of the network, not on the program: host names, SNI and the Host
header stay the providers', as in production.

UPSTREAM_NAMES holds JSON: {"names": {host: address}, "ports": {"80": port, "443": port}}.
Each name resolves to an address of its own from a test network, and a connection to
the name or to that address goes to 127.0.0.1 and the port that stands in for 80 or 443. All
other names except localhost do not resolve, so no test can reach the network by mistake.
"""

import ipaddress
import json
import os
import socket
from typing import Any

_LOCAL = {"", "localhost", "localhost.localdomain", socket.gethostname()}


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def install(names: dict[str, str], ports: dict[str, int]) -> None:
    """Wrap this process's name resolution and outgoing connections."""
    import asyncio

    known = {*names, *names.values()}
    resolve = socket.getaddrinfo
    connect = socket.create_connection
    loop_class: Any = asyncio.base_events.BaseEventLoop
    connect_async = loop_class.create_connection

    def target(host: Any, port: Any) -> tuple[Any, Any]:
        name = host.decode() if isinstance(host, bytes) else host
        if isinstance(name, str) and name.lower() in known and str(port) in ports:
            return "127.0.0.1", ports[str(port)]
        return host, port

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if isinstance(name, str) and name not in _LOCAL and not _is_literal(name):
            address = names.get(name.lower().rstrip("."))
            if address is None:
                reason = f"{name} is not a name of the fake provider"
                raise socket.gaierror(socket.EAI_NONAME, reason)
            host = address
        return resolve(host, port, *args, **kwargs)

    def create_connection(address: Any, *args: Any, **kwargs: Any) -> Any:
        return connect(target(*address[:2]), *args, **kwargs)

    async def create_connection_async(
        self: Any, factory: Any, host: Any = None, port: Any = None, **kwargs: Any
    ) -> Any:
        # asyncio takes the name to verify from `host`, which is about to change.
        if kwargs.get("ssl") and host and kwargs.get("server_hostname") is None:
            kwargs["server_hostname"] = host
        host, port = target(host, port)
        return await connect_async(self, factory, host, port, **kwargs)

    socket.getaddrinfo = getaddrinfo
    socket.create_connection = create_connection
    loop_class.create_connection = create_connection_async


if _given := os.environ.get("UPSTREAM_NAMES"):
    install(**json.loads(_given))
