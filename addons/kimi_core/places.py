"""Where the suite keeps its files, found without importing anything slow."""

from __future__ import annotations

import os
from pathlib import Path

_ADDONS = Path(__file__).resolve().parents[1]


def state_dir() -> Path:
    """Return the folder of the store, the log and the record of what runs.

    "All paths set in these environment variables must be absolute. If an implementation encounters
    a relative path [...] it should consider the path invalid and ignore it."
    -- https://specifications.freedesktop.org/basedir-spec/latest/
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if os.path.isabs(state) else Path("~/.local/state").expanduser()
    return base / "kimi-proxy"


def checkout() -> Path | None:
    """Return the checkout that this file stands in; None in an installed package."""
    parent = _ADDONS.parent
    return parent if (parent / "pyproject.toml").is_file() else None


def confdir() -> Path:
    """Return where the suite keeps its CA: `certs/` of the checkout, else of the state folder."""
    return (checkout() or state_dir()) / "certs"


def store() -> Path:
    """Return where the store is unless an option says otherwise."""
    return state_dir() / "kimi.db"
