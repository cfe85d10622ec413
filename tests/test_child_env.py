from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kimi_core import child_env

OURS = "-----BEGIN CERTIFICATE-----\nb3Vycw==\n-----END CERTIFICATE-----"
OTHER = "-----BEGIN CERTIFICATE-----\nb3RoZXI=\n-----END CERTIFICATE-----"
NASTY = "a 'b' \"c\" $HOME `id` \\ ;&|\n*é"


@pytest.fixture
def confdir(tmp_path: Path) -> Path:
    (tmp_path / child_env.CA_CERT).write_text(OURS + "\n")
    return tmp_path


def test_the_bundle_holds_the_systems_cas_the_users_and_ours_each_once(confdir: Path) -> None:
    corporate = confdir / "corporate.pem"
    corporate.write_text(f"a comment\n{OTHER}\n{OURS}\n")

    text = child_env.write_bundle(confdir, {"SSL_CERT_FILE": str(corporate)}).read_text()

    assert text.count(OURS) == text.count(OTHER) == 1
    assert text.count("BEGIN CERTIFICATE") > 50
    assert "a comment" not in text


def test_the_bundle_is_written_anew_only_when_a_ca_has_changed(confdir: Path) -> None:
    bundle = child_env.write_bundle(confdir, {})
    first = bundle.stat().st_ino
    assert child_env.write_bundle(confdir, {"SSL_CERT_FILE": str(bundle)}).stat().st_ino == first

    (confdir / child_env.CA_CERT).write_text(OTHER)
    text = child_env.write_bundle(confdir, {"SSL_CERT_FILE": str(bundle)}).read_text()

    assert OTHER in text
    assert OURS not in text


def test_variables_that_replace_the_systems_cas_get_the_bundle_the_others_our_ca(
    confdir: Path,
) -> None:
    said = child_env.proxy_variables("http://127.0.0.1:1", confdir, {})

    assert said["HTTPS_PROXY"] == said["https_proxy"] == "http://127.0.0.1:1"
    assert "HTTP_PROXY" not in said
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO"):
        assert said[name] == str(confdir / child_env.BUNDLE)
    assert said["NODE_EXTRA_CA_CERTS"] == str(confdir / child_env.CA_CERT)


def test_no_proxy_keeps_what_is_there() -> None:
    said = child_env.base_url_variables("http://127.0.0.1:1", {"NO_PROXY": "a.example, localhost"})

    assert said["NO_PROXY"] == said["no_proxy"] == "a.example,localhost,127.0.0.1,::1"


def test_base_urls_come_with_a_key_only_where_none_is_set() -> None:
    environ = {"OPENAI_API_KEY": "mine", "ANTHROPIC_AUTH_TOKEN": "mine too"}

    said = child_env.base_url_variables("http://127.0.0.1:1", environ)

    assert said["OPENAI_BASE_URL"] == said["OPENAI_API_BASE"] == "http://127.0.0.1:1/v1"
    assert said["ANTHROPIC_BASE_URL"] == said["GOOGLE_GEMINI_BASE_URL"] == "http://127.0.0.1:1"
    assert "OPENAI_API_KEY" not in said
    assert "ANTHROPIC_API_KEY" not in said
    assert said["GEMINI_API_KEY"]


@pytest.mark.parametrize("shell", ["sh", "bash", "zsh", "fish"])
def test_a_shell_gets_the_very_value(shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    lines = child_env.shell_lines({"KIMI_TEST": NASTY}, shell)

    said = subprocess.run(
        [program, "-c", f"{lines}\nprintenv KIMI_TEST"],
        capture_output=True,
        env={"PATH": os.environ["PATH"]},
        check=True,
    )

    assert said.stdout.decode() == NASTY + "\n"


def test_quotes_are_escaped_as_fish_powershell_and_json_want_it() -> None:
    variables = {"A": "it's \\"}

    assert child_env.shell_lines(variables, "fish") == "set -gx A 'it\\'s \\\\'"
    assert child_env.shell_lines(variables, "powershell") == "$env:A = 'it''s \\'"
    assert json.loads(child_env.shell_lines(variables, "json")) == variables


def test_the_login_shell_decides_the_syntax() -> None:
    assert child_env.guess_shell({"SHELL": "/usr/bin/fish"}) == "fish"
    assert child_env.guess_shell({"SHELL": "/bin/zsh"}) == "sh"
    assert child_env.guess_shell({}) == "sh"
