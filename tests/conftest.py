"""Fixtures for tests with live traffic: a fake provider, and a proxy before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy import Proxy
from upstream import Upstream


@pytest.fixture(scope="module")
def provider() -> Iterator[Upstream]:
    """The fake provider, for all tests of a module; each `up` begins afresh."""
    with Upstream(hosts=_hosts()) as started:
        yield started


@pytest.fixture
def up(provider: Upstream) -> Upstream:
    from upstream import Reply

    provider.clear()
    provider.default = Reply()
    return provider


@pytest.fixture(scope="module")
def chain(provider: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The whole chain before the fake provider, for all tests of a module."""
    folder: Path = tmp_path_factory.mktemp("chain")
    with Proxy(folder, provider, arguments=["-w", str(folder / "flows.mitm")]) as started:
        yield started


def _hosts() -> tuple[str, ...]:
    from upstream import PROVIDER_HOSTS

    return (*PROVIDER_HOSTS, "localhost", "127.0.0.1", "tunnelled.example", "other.example")
