"""How a child process finds the fake provider behind the providers' own host names."""

import ipaddress
import json
import os
from collections.abc import Iterable
from pathlib import Path

SITE = Path(__file__).with_name("site")

# Reserved for benchmarks and never routed on the internet, yet no loopback address, so that code
# which looks at addresses sees a stranger: https://www.rfc-editor.org/rfc/rfc6890#section-2.2.2
_NETWORK = ipaddress.ip_network("198.18.0.0/15")


def _is_name(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host != "localhost" and "*" not in host
    return False


def environment(hosts: Iterable[str], http_port: int, https_port: int) -> dict[str, str]:
    """Return PYTHONPATH and UPSTREAM_NAMES for `site/sitecustomize.py`, which see."""
    addresses = _NETWORK.hosts()
    given = {
        "names": {h.lower(): str(next(addresses)) for h in hosts if _is_name(h)},
        "ports": {"80": http_port, "443": https_port},
    }
    path = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))
    return {"UPSTREAM_NAMES": json.dumps(given), "PYTHONPATH": path}
