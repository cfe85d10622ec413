from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kimi_core import continue_config
from kimi_core.continue_config import CannotMerge, entry, merged

ENTRIES = [entry("kimi-a", "http://127.0.0.1:8080", 1000), entry("kimi-b", "http://x", None)]


def test_an_entry_points_at_the_proxy_and_knows_the_window() -> None:
    assert ENTRIES[0]["provider"] == "openai"
    assert ENTRIES[0]["apiBase"] == "http://127.0.0.1:8080/v1"
    assert ENTRIES[0]["defaultCompletionOptions"] == {"contextLength": 1000}
    assert "defaultCompletionOptions" not in ENTRIES[1]


def test_the_folder_can_be_moved() -> None:
    assert continue_config.path({"CONTINUE_GLOBAL_DIR": "/c"}) == Path("/c/config.yaml")
    assert continue_config.path({}) == Path("~/.continue/config.yaml").expanduser()


@pytest.mark.parametrize(
    "text",
    [
        "name: mine # why\nmodels:\n  - name: x\n    model: y\n",
        "models:\n- name: x\n  model: y # last\n",
        "models:\n- name: x\n  model: y",
        "models:\n  - name: x\n    roles:\n      - chat\n\n# about rules\nrules:\n  - be kind\n",
        "models:\n  - name: x\n    prompt: |\n      several\n      lines\n\nrules: []\n",
        "models:\n  - uses: a/b\n  # a comment at the end\n",
        "models:\n    - name: x\n      env: {a: 1}\n    # a comment\ncontext: [a]\n",
        "models:\nrules:\n- a\n",
        "models: []\nname: x\n",
        "models: [] # none yet\nname: x\n",
        "models:\n",
        "name: mine\n",
        "name: mine",
        "# only a comment\nname: 'é'\n",
        "models:\r\n  - name: x\r\n    model: y\r\nname: z\r\n",
    ],
)
def test_models_are_added_and_all_else_stays(text: str) -> None:
    before = yaml.safe_load(text)

    result = merged(text, ENTRIES)

    after = yaml.safe_load(result)
    assert after == {**before, "models": [*(before.get("models") or []), *ENTRIES]}
    kept = [line.strip() for line in text.splitlines() if "#" in line and "[]" not in line]
    assert [line for line in kept if line not in map(str.strip, result.splitlines())] == []
    assert merged(result, ENTRIES) == result


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_file_becomes_a_whole_one(text: str) -> None:
    after = yaml.safe_load(merged(text, ENTRIES))

    assert after["schema"] == "v1"
    assert after["models"] == ENTRIES


@pytest.mark.parametrize(
    "text",
    [
        "models: [{name: x}]\n",
        "{models: []}\n",
        "- a\n",
        "models: {a: 1}\n",
        "models: text\n",
        "a: [\n",
        "models: !secret x\n",
    ],
)
def test_what_cannot_be_added_to_safely_is_left_to_its_owner(text: str) -> None:
    with pytest.raises(CannotMerge):
        merged(text, ENTRIES)
