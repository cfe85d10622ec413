"""How a machine is told to trust the proxy's CA."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NAME = "kimi-proxy.crt"


@dataclass(frozen=True, slots=True)
class Steps:
    """What makes this system trust a certificate, as commands; `as_root`: only root may."""

    system: str
    commands: tuple[tuple[str, ...], ...]
    as_root: bool


def find(tool: str) -> str | None:
    """Return the path of a program, also where only root has its folder on the path."""
    return shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")


def steps(
    certificate: Path,
    platform: str = sys.platform,
    find: Callable[[str], str | None] = find,
) -> Steps | None:
    """Return the steps for this system; None when it is none that we know."""
    cert = str(certificate)
    if platform == "darwin":
        keychain = "/Library/Keychains/System.keychain"
        command = ("security", "add-trusted-cert", "-d", "-r", "trustRoot", "-k", keychain, cert)
        return Steps("macOS", (command,), True)
    if platform == "win32":
        return Steps("Windows", (("certutil", "-user", "-addstore", "Root", cert),), False)
    for tool, system, folder in (
        ("update-ca-certificates", "Debian, Ubuntu, Alpine", "/usr/local/share/ca-certificates"),
        ("update-ca-trust", "Fedora, RHEL", "/etc/pki/ca-trust/source/anchors"),
        ("trust", "Arch", ""),
    ):
        if find(tool) is None:
            continue
        if not folder:
            return Steps(system, ((tool, "anchor", "--store", cert),), True)
        copy = ("install", "-D", "-m", "644", cert, f"{folder}/{NAME}")
        return Steps(system, (copy, (tool,)), True)
    return None
