"""What is wrong with an installation, and what to do about it; works when no proxy runs."""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

from kimi_core import child_env, process
from kimi_core.process import Running, Settings
from kimi_core.rules import Rules, RulesError, load

State = Literal["ok", "warn", "fail"]

EXPIRES_SOON_S = 30 * 86400
CA_KEY = "mitmproxy-ca.pem"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `advice` says what to do, empty when nothing is to be done."""

    name: str
    state: State
    text: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is examined: the settings a proxy has or would get, with all paths filled in."""

    settings: Settings
    running: Running | None
    rules: Path
    store: Path
    confdir: Path
    environ: Mapping[str, str]


def examine(subject: Subject, now: float | None = None) -> Iterator[Check]:
    """Yield the findings one by one, as they are made."""
    yield python()
    yield mitmproxy()
    yield from ports(subject)
    rules: Rules | None = None
    try:
        rules = load(subject.rules, subject.environ)
    except RulesError as error:
        yield Check("rules", "fail", str(error), "correct the file, it is named above")
    if rules is not None:
        yield Check(
            "rules",
            "ok",
            f"{subject.rules}: {len(rules.providers)} providers, {len(rules.models)} models",
        )
        yield keys(rules)
        yield loop(rules, subject.settings)
    yield from authority(subject.confdir, time.time() if now is None else now)
    yield store(subject.store)
    yield proxy(subject)
    yield page(subject)


def python() -> Check:
    return Check("Python", "ok", sys.version.split()[0])


def mitmproxy() -> Check:
    try:
        version = metadata.version("mitmproxy")
    except metadata.PackageNotFoundError:
        return Check("mitmproxy", "fail", "is not installed", f"{sys.executable} -m pip install .")
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < (11, 0):
        return Check("mitmproxy", "fail", version, "install mitmproxy 11.0.2, or 12.2 and newer")
    if (major, minor) < (11, 1):
        # https://github.com/mitmproxy/mitmproxy/security/advisories/GHSA-wg33-5h85-7q5p
        return Check(
            "mitmproxy",
            "warn",
            f"{version}: mitmweb has no password",
            "use Python 3.12 or newer, or start with --no-web where others have accounts",
        )
    return Check("mitmproxy", "ok", version)


def ports(subject: Subject) -> Iterator[Check]:
    """Yield whether each port is ours or free."""
    for name, port in subject.settings.ports.items():
        host = subject.settings.host if name == "proxy" else "127.0.0.1"
        problem = process.listen_problem(host, port)
        where = f"port of {name}"
        if subject.running is not None:
            if problem:
                yield Check(where, "ok", f"{port}: the running proxy's")
            else:
                yield Check(where, "fail", f"{port}: nothing listens", "kimi-proxy restart")
        elif problem:
            option = {"proxy": "--port", "mitmweb": "--web-port", "stats": "--stats-port"}[name]
            yield Check(where, "fail", problem, f"stop it, or start with {option} N")
        else:
            yield Check(where, "ok", f"{port}: free")


def keys(rules: Rules) -> Check:
    """Return which variables of keys are set; their values are not looked at."""
    named = {p.key_variable: p.key is not None for p in rules.providers.values() if p.key_variable}
    present = sorted(name for name, is_set in named.items() if is_set)
    missing = sorted(name for name, is_set in named.items() if not is_set)
    broken = [f"{p.name}: {p.problem}" for p in rules.providers.values() if p.problem and p.key]
    if broken:
        return Check("keys", "fail", "; ".join(broken), "correct it in the environment or .env")
    if not any(p.key for p in rules.providers.values()) and missing:
        return Check(
            "keys",
            "warn",
            "none is set; only clients that send their own key get an answer",
            f"write one of these into .env: {', '.join(missing)}",
        )
    said = f"set: {', '.join(present)}" if present else "no variable is needed"
    return Check("keys", "ok", said + (f"; not set: {', '.join(missing)}" if missing else ""))


def loop(rules: Rules, settings: Settings) -> Check:
    """Return whether a provider's base URL leads back to one of our own ports."""
    addresses = [
        (host, port)
        for port in settings.ports.values()
        for host in (settings.host, settings.client_host, "localhost")
    ]
    found = rules.points_at(addresses)
    if found:
        return Check(
            "loop",
            "fail",
            f"the base_url of {', '.join(p.name for p in found)} leads back to this proxy",
            "write the provider's own address into rules.yaml",
        )
    return Check("loop", "ok", "no base_url leads back to this proxy")


def authority(confdir: Path, now: float) -> Iterator[Check]:
    """Yield what is to say of the CA: there, readable, in its time, kept private."""
    key_file, cert_file = confdir / CA_KEY, confdir / child_env.CA_CERT
    if not key_file.exists():
        yield Check(
            "CA",
            "warn",
            f"not made yet in {confdir}",
            "it is made at the first start, or by `kimi-proxy trust`",
        )
        return
    from cryptography import x509

    try:
        own = x509.load_pem_x509_certificates(key_file.read_bytes())[0]
        shown = x509.load_pem_x509_certificates(cert_file.read_bytes())[0]
    except (OSError, ValueError, IndexError) as error:
        yield Check(
            "CA",
            "fail",
            f"{confdir} holds no usable CA: {type(error).__name__}",
            f"remove the files {confdir}/mitmproxy-ca*, start again, and trust the new CA",
        )
        return
    begin, end = own.not_valid_before_utc, own.not_valid_after_utc
    today = datetime.fromtimestamp(now, UTC)
    anew = f"remove the files {confdir}/mitmproxy-ca*, start again, and trust the new CA"
    if own != shown:
        yield Check("CA", "fail", f"{cert_file.name} is not the certificate of {CA_KEY}", anew)
    elif today < begin:
        yield Check("clock", "fail", f"it is before the CA was made ({begin:%F})", "set the clock")
    elif today >= end:
        yield Check("CA", "fail", f"expired on {end:%F}", anew)
    elif end.timestamp() - now < EXPIRES_SOON_S:
        yield Check("CA", "warn", f"expires on {end:%F}", anew)
    else:
        yield Check("CA", "ok", f"{cert_file}, valid until {end:%F}")
    if not process.is_private(key_file):
        yield Check(
            "CA's key",
            "fail",
            f"{key_file} can be read by others, who could then read your traffic",
            f"chmod 600 {key_file}, or make a new CA",
        )


def store(path: Path) -> Check:
    """Return whether the database opens and is whole."""
    if not path.exists():
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if os.access(folder, os.W_OK):
            return Check("store", "ok", f"{path} will be made at the first start")
        return Check("store", "fail", f"{folder} cannot be written", "choose another --store")
    from kimi_core.store.schema import StoreError, check, connect

    try:
        db = connect(path, timeout_s=2.0, read_only=True)
        try:
            check(db)
            said = [row[0] for row in db.execute("PRAGMA quick_check(3)").fetchall()]
            rows = db.table("exchanges").count if db.table("exchanges").exists() else 0
        finally:
            db.close()
    except (StoreError, sqlite3.Error) as error:
        return Check("store", "fail", f"{path} {error}", "move the file away, or name another")
    if said != ["ok"]:
        return Check("store", "fail", f"{path} is damaged: {said[0]}", "move the file away")
    if not process.is_private(path):
        return Check("store", "warn", f"{path} can be read by others", f"chmod 600 {path}")
    return Check("store", "ok", f"{path}, {rows:,} exchanges")


def proxy(subject: Subject) -> Check:
    """Return whether the proxy answers a base-URL client."""
    settings = subject.settings
    if subject.running is None:
        return Check("proxy", "warn", "does not run", "kimi-proxy start")
    try:
        status, said = process.get_json(settings.client_host, settings.port, "/v1/models")
    except OSError as error:
        return Check("proxy", "fail", f"{settings.proxy_url} does not answer: {error}", _RESTART)
    if said is None:
        text = f"{settings.proxy_url} answers {status}, without JSON: another program?"
        return Check("proxy", "fail", text, _RESTART)
    return Check("proxy", "ok", f"{settings.proxy_url} answers, process {subject.running.pid}")


def page(subject: Subject) -> Check:
    """Return what the stats page says of its own health."""
    if subject.running is None or not subject.settings.stats_port:
        return Check("stats", "ok", "not asked, since it does not run")
    said = process.health(subject.settings)
    if said is None:
        port = subject.settings.stats_port
        return Check("stats", "fail", f"port {port} does not answer /health", _RESTART)
    state = str(said.get("status", "ok"))
    if state != "ok":
        return Check("stats", "warn", f"/health says {state}", "kimi-proxy status --json says more")
    return Check("stats", "ok", "/health says ok")


_RESTART = "kimi-proxy restart, then kimi-proxy logs"
