"""The variables with which a program sends its model calls through the proxy."""

from __future__ import annotations

import os
import re
import shlex
import ssl
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

BUNDLE = "bundle.pem"
CA_CERT = "mitmproxy-ca-cert.pem"

REPLACES_SYSTEM_CAS = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "AWS_CA_BUNDLE",
    "PIP_CERT",
    "CARGO_HTTP_CAINFO",
    "HTTPLIB2_CA_CERTS",
    "NIX_SSL_CERT_FILE",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
)
"""What these name is all that a program trusts, and other hosts keep their own certificates."""

ADDS_CAS = ("NODE_EXTRA_CA_CERTS", "DENO_CERT")

_SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora
    "/etc/ssl/ca-bundle.pem",  # openSUSE
    "/etc/ssl/cert.pem",  # Alpine, macOS
)
_CERTIFICATE = re.compile(
    rb"-----BEGIN (?:TRUSTED )?CERTIFICATE-----.+?-----END (?:TRUSTED )?CERTIFICATE-----", re.S
)
_DIRECT = ("localhost", "127.0.0.1", "::1")
_KEYS = {
    "OPENAI_API_KEY": ("OPENAI_API_KEY",),
    "ANTHROPIC_API_KEY": ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"),
    "GEMINI_API_KEY": ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
}


def proxy_variables(url: str, confdir: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for a client that uses a proxy, and make the bundle they name.

    HTTP_PROXY is left alone: plain HTTP is no provider's, and through the proxy it could be read.
    Raises OSError when the CA in `confdir` cannot be read or the bundle not written.
    """
    bundle = str(write_bundle(confdir, environ))
    ca = str(confdir / CA_CERT)
    return {
        "HTTPS_PROXY": url,
        "https_proxy": url,
        **_no_proxy(environ),
        **dict.fromkeys(REPLACES_SYSTEM_CAS, bundle),
        **dict.fromkeys(ADDS_CAS, ca),
        "KIMI_PROXY_URL": url,
    }


def base_url_variables(url: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for a client that takes a base URL.

    An SDK does not start without a key: one that is not set gets a text that is no key, and the
    proxy puts the provider's own in its place.
    """
    dummies = {
        name: "kimi-proxy"
        for name, names in _KEYS.items()
        if not any(environ.get(other) for other in names)
    }
    return {
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_API_BASE": f"{url}/v1",
        "ANTHROPIC_BASE_URL": url,
        "GOOGLE_GEMINI_BASE_URL": url,
        **dummies,
        **_no_proxy(environ),
        "KIMI_PROXY_URL": url,
    }


def _no_proxy(environ: Mapping[str, str]) -> dict[str, str]:
    given = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    names = [name.strip() for name in given.split(",") if name.strip()]
    value = ",".join(dict.fromkeys([*names, *_DIRECT]))
    return {"NO_PROXY": value, "no_proxy": value}


# --- the bundle -----------------------------------------------------------------------


def write_bundle(confdir: Path, environ: Mapping[str, str]) -> Path:
    """Return a file of the CAs this machine trusts and ours, written anew when one has changed."""
    bundle = confdir / BUNDLE
    ours = (confdir / CA_CERT).read_bytes()
    sources = [path.read_bytes() for path in _trusted_files(environ) if path != bundle]
    blocks = dict.fromkeys(
        block.replace(b"\r\n", b"\n")
        for data in (*sources, ours)
        for block in _CERTIFICATE.findall(data)
    )
    data = b"\n".join(blocks) + b"\n"
    if not bundle.is_file() or bundle.read_bytes() != data:
        # Programs of an earlier run may be reading the old one.
        fd, name = tempfile.mkstemp(dir=confdir, prefix=f".{BUNDLE}.")
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            os.fchmod(fd, 0o644)
        os.replace(name, bundle)
    return bundle


def _trusted_files(environ: Mapping[str, str]) -> Iterable[Path]:
    named = [environ.get(name, "") for name in REPLACES_SYSTEM_CAS]
    named += [ssl.get_default_verify_paths().openssl_cafile, *_SYSTEM_BUNDLES, _certifi()]
    seen = dict.fromkeys(Path(name).resolve() for name in named if name)
    return [path for path in seen if path.is_file() and os.access(path, os.R_OK)]


def _certifi() -> str:
    try:
        import certifi
    except ImportError:
        return ""
    return certifi.where()


# --- for a shell ----------------------------------------------------------------------


def shell_lines(variables: Mapping[str, str], shell: str) -> str:
    """Return lines that set the variables in `shell`: sh, bash, zsh, fish, powershell or json."""
    if shell == "json":
        import json

        return json.dumps(variables, indent=2)
    return "\n".join(_line(name, value, shell) for name, value in variables.items())


def _line(name: str, value: str, shell: str) -> str:
    if shell == "fish":
        # "The only meaningful escape sequences in single quotes are \' [...] and \\"
        # -- https://fishshell.com/docs/current/language.html#quotes (read 2026-11-21)
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"set -gx {name} '{quoted}'"
    if shell == "powershell":
        quoted = value.replace("'", "''")
        return f"$env:{name} = '{quoted}'"
    return f"export {name}={shlex.quote(value)}"


def guess_shell(environ: Mapping[str, str]) -> str:
    """Return the syntax of the login shell; sh where it is none that differs."""
    if sys.platform == "win32":
        return "powershell"
    return "fish" if Path(environ.get("SHELL", "")).name == "fish" else "sh"
