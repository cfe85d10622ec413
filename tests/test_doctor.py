from __future__ import annotations

import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mitmproxy.certs import CertStore

from kimi_core import doctor, process
from kimi_core.doctor import Subject, examine
from kimi_core.process import Settings

KEY = "sk-planted-in-a-test-0123456789"
YEAR_S = 365 * 86400
RULES = """
version: 1
providers:
  a: {api: openai, base_url: "%s", key: "${KEY_OF_A}"}
  b: {api: openai, base_url: "https://b.example/v1", key: "${KEY_OF_B}"}
models: {}
"""


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    CertStore.from_store(folder, "mitmproxy", 2048)
    return folder


@pytest.fixture
def subject(tmp_path: Path, certs: Path) -> Subject:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES % "https://a.example/v1")
    settings = Settings(port=process.free_port(), web_port=0, stats_port=0)
    return Subject(settings, None, rules, tmp_path / "kimi.db", certs, {"KEY_OF_A": KEY})


def _states(subject: Subject, now: float | None = None) -> dict[str, str]:
    return {check.name: check.state for check in examine(subject, now)}


def test_a_sound_installation_has_no_failure_and_shows_no_key(subject: Subject) -> None:
    found = list(examine(subject))

    assert [check for check in found if check.state == "fail"] == []
    keys = next(check for check in found if check.name == "keys")
    assert keys.text == "set: KEY_OF_A; not set: KEY_OF_B"
    assert KEY not in str(found)


def test_without_any_key_there_is_a_warning_that_names_the_variables(subject: Subject) -> None:
    keys = next(c for c in examine(replace(subject, environ={})) if c.name == "keys")

    assert keys.state == "warn"
    assert "KEY_OF_A, KEY_OF_B" in keys.advice


def test_wrong_rules_are_named_and_the_other_checks_are_made(subject: Subject) -> None:
    subject.rules.write_text("version: 1\nproviders: 7\n")

    found = {check.name: check for check in examine(subject)}

    assert found["rules"].state == "fail"
    assert "rules.yaml:2" in found["rules"].text
    assert found["CA"].state == "ok"


def test_a_base_url_that_leads_back_to_the_proxy_is_found(subject: Subject) -> None:
    subject.rules.write_text(RULES % f"http://localhost:{subject.settings.port}/v1")

    assert _states(subject)["loop"] == "fail"


def test_an_expired_ca_and_a_clock_before_it_are_told_apart(subject: Subject) -> None:
    now = time.time()

    assert _states(subject, now)["CA"] == "ok"
    assert _states(subject, now + 11 * YEAR_S)["CA"] == "fail"
    assert _states(subject, now - YEAR_S)["clock"] == "fail"
    assert "warn" in {_states(subject, now + 10 * YEAR_S - d * 86400)["CA"] for d in (10, 20)}


def test_a_ca_that_others_can_read_is_a_failure(subject: Subject, tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    folder.mkdir()
    for source in subject.confdir.glob("mitmproxy-ca*.pem"):
        (folder / source.name).write_bytes(source.read_bytes())
    (folder / doctor.CA_KEY).chmod(0o640)

    assert _states(replace(subject, confdir=folder))["CA's key"] == "fail"


def test_a_ca_of_two_halves_and_one_that_is_none_are_failures(
    subject: Subject, tmp_path: Path
) -> None:
    folder = tmp_path / "certs"
    CertStore.from_store(folder, "mitmproxy", 2048)
    shown = folder / "mitmproxy-ca-cert.pem"
    shown.write_bytes((subject.confdir / shown.name).read_bytes())
    assert _states(replace(subject, confdir=folder))["CA"] == "fail"

    (folder / doctor.CA_KEY).write_text("nothing")
    assert _states(replace(subject, confdir=folder))["CA"] == "fail"

    assert _states(replace(subject, confdir=tmp_path / "none"))["CA"] == "warn"


def test_a_store_that_is_no_database_or_another_programs_is_a_failure(subject: Subject) -> None:
    subject.store.write_bytes(b"this is no database, and it is longer than a header" * 40)
    assert _states(subject)["store"] == "fail"

    subject.store.unlink()
    other = sqlite3.connect(subject.store)
    other.execute("create table theirs (x)")
    other.close()
    assert _states(subject)["store"] == "fail"


def test_a_running_proxy_that_does_not_answer_is_a_failure(subject: Subject) -> None:
    running = process.Running(1, 0.0, subject.settings)

    states = _states(replace(subject, running=running))

    assert states["port of proxy"] == states["proxy"] == "fail"
