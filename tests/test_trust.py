from __future__ import annotations

from pathlib import Path

import pytest

from kimi_core import trust

CERT = Path("/c/mitmproxy-ca-cert.pem")


@pytest.mark.parametrize(
    ("tool", "copy"),
    [
        ("update-ca-certificates", "/usr/local/share/ca-certificates/kimi-proxy.crt"),
        ("update-ca-trust", "/etc/pki/ca-trust/source/anchors/kimi-proxy.crt"),
    ],
)
def test_the_certificate_goes_where_the_distributions_tool_looks(tool: str, copy: str) -> None:
    steps = trust.steps(CERT, "linux", {tool: "/usr/sbin/it"}.get)

    assert steps is not None
    assert steps.as_root
    assert steps.commands[0][-2:] == (str(CERT), copy)
    assert steps.commands[-1] == (tool,)


@pytest.mark.parametrize(
    ("platform", "tool", "as_root"),
    [("darwin", "security", True), ("win32", "certutil", False), ("linux", "trust", True)],
)
def test_other_systems_take_the_certificate_from_where_it_is(
    platform: str, tool: str, as_root: bool
) -> None:
    steps = trust.steps(CERT, platform, {tool: tool}.get)

    assert steps is not None
    assert [command[0] for command in steps.commands] == [tool]
    assert steps.commands[0][-1] == str(CERT)
    assert steps.as_root is as_root


def test_an_unknown_system_has_no_steps() -> None:
    assert trust.steps(CERT, "linux", lambda tool: None) is None
