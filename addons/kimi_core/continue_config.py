"""Models of the proxy in Continue's config.yaml, added without losing what is there.

https://docs.continue.dev/reference (read 2026-11-21)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml


class CannotMerge(Exception):
    """The file has a shape that cannot be added to safely; the text says why."""


def path(environ: Mapping[str, str]) -> Path:
    """Return where Continue reads its configuration."""
    folder = environ.get("CONTINUE_GLOBAL_DIR")
    return Path(folder or "~/.continue").expanduser() / "config.yaml"


def entry(model: str, url: str, context: int | None) -> dict[str, Any]:
    """Return Continue's entry for one model that the proxy serves."""
    found: dict[str, Any] = {
        "name": f"{model} (kimi-proxy)",
        "provider": "openai",
        "model": model,
        "apiBase": f"{url}/v1",
        # Continue sends one; the proxy puts the provider's own in its place.
        "apiKey": "kimi-proxy",
        "roles": ["chat", "edit", "apply"],
        "capabilities": ["tool_use"],
    }
    if context:
        found["defaultCompletionOptions"] = {"contextLength": context}
    return found


def document(entries: list[dict[str, Any]]) -> str:
    """Return a whole config.yaml with these models."""
    head = {"name": "kimi-proxy", "version": "1.0.0", "schema": "v1"}
    return dump({**head, "models": entries})


def dump(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


def merged(text: str, entries: list[dict[str, Any]]) -> str:
    """Return `text` with the entries added whose names it has not; all else keeps its bytes.

    Raises CannotMerge when it is not YAML, or its models are not a list in block style.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        before = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CannotMerge(f"it is not valid YAML: {error}") from None
    if root is None:
        return document(entries)
    if not isinstance(root, yaml.MappingNode) or not isinstance(before, dict):
        raise CannotMerge("it is not a mapping")
    given = before.get("models") or []
    if not isinstance(given, list):
        raise CannotMerge("its models are not a list")
    new = [each for each in entries if each["name"] not in _names(given)]
    if not new:
        return text
    result = _inserted(text, root, new)
    try:
        after = yaml.safe_load(result)
    except yaml.YAMLError:
        after = None
    if after != {**before, "models": [*given, *new]}:
        raise CannotMerge("its models are written in a way that cannot be added to")
    return result


def _names(models: Iterable[Any]) -> set[Any]:
    return {model.get("name") for model in models if isinstance(model, dict)}


def _inserted(text: str, root: yaml.MappingNode, new: list[dict[str, Any]]) -> str:
    end = "" if not text or text.endswith("\n") else "\n"
    found = next((pair for pair in root.value if pair[0].value == "models"), None)
    if root.flow_style or (found and found[1].value and getattr(found[1], "flow_style", False)):
        raise CannotMerge("it is written in flow style, as in [a, b]")
    if found is None:
        return f"{text}{end}{dump({'models': new})}"
    key, value = found
    if not value.value:  # `models:` and nothing, or []
        start = text.rindex(":", key.end_mark.index, value.start_mark.index + 1) + 1
        return f"{text[:start]}\n{_items(new, 2)}{text[value.end_mark.index :].lstrip(' ')}"
    last: yaml.Node = value.value[-1]
    # A node ends where the next token begins: comments and blank lines between them stay behind.
    body = text[: last.end_mark.index]
    kept = len(body.rstrip())
    line_end = text.find("\n", _end_of_value(text, kept))
    cut = len(text) if line_end < 0 else line_end + 1
    between = "" if text[:cut].endswith("\n") else "\n"
    return f"{text[:cut]}{between}{_items(new, value.start_mark.column)}{text[cut:]}"


def _end_of_value(text: str, kept: int) -> int:
    """Return the end of the last line before `kept` that is no comment."""
    lines = text[:kept].splitlines(keepends=True)
    while lines and lines[-1].lstrip().startswith("#"):
        lines.pop()
    return max(len("".join(lines).rstrip()), 0)


def _items(entries: list[dict[str, Any]], indent: int) -> str:
    pad = " " * indent
    return "".join(f"{pad}{line}\n" for line in dump(entries).splitlines())
