"""What a request says of its tools, and the tool that is added to them."""

from __future__ import annotations

from typing import Any

from kimi_core import dialects
from kimi_core.dialects import Dialect
from kimi_core.dialects.base import mappings, text
from kimi_core.document import Document, encode


def declared(document: Document) -> frozenset[str]:
    """Return the names of the client's tools."""
    names: set[str] = set()
    for _, tool in mappings(document.get("tools")):
        held = tool.get("function") or tool.get("custom") or tool
        names.add(text(held.get("name")) if isinstance(held, dict) else "")
    return frozenset(names)


def tool_choice(document: Document) -> str:
    """Return "auto", "required" or "none"; anything else where the client says more than that."""
    choice = document.get("tool_choice", "auto")
    if isinstance(choice, dict) and choice.get("type") in ("auto", "any", "none"):
        choice = choice["type"]
    return "required" if choice == "any" else text(choice)


def wants_choices(document: Document, dialect: Dialect) -> bool:
    """Tell whether several choices are wanted."""
    return dialect is dialects.OPENAI and document.get("n", 1) != 1


def wants_something_else(document: Document, dialect: Dialect) -> bool:
    """Tell whether several choices are wanted, or text in JSON: that is an answer in itself."""
    if wants_choices(document, dialect):
        return True
    if dialect is dialects.OPENAI:
        formats = [document.get("response_format")]
    else:
        config = document.get("output_config")
        formats = [document.get("output_format")]
        formats.append(config.get("format") if isinstance(config, dict) else None)
    return any(isinstance(one, dict) and one.get("type") != "text" for one in formats)


def offer(
    document: Document, dialect: Dialect, name: str, description: str, parameters: dict[str, Any]
) -> None:
    """Add a tool after those of the client; `parameters` is a JSON Schema."""
    told = {"name": name, "description": description}
    if dialect is dialects.ANTHROPIC:
        tool: dict[str, Any] = {**told, "input_schema": parameters}
    else:
        tool = {"type": "function", "function": {**told, "parameters": parameters}}
    document.append_raw(("tools",), encode(tool))
