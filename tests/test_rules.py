from __future__ import annotations

import copy
import os
import pickle
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kimi_core import rules
from kimi_core.env import Secret
from kimi_core.rules import Match, Rules, RulesError, RulesFile, Score, Target

CHECKOUT = Path(__file__).resolve().parents[1]
SHIPPED = CHECKOUT / "rules.yaml"

SMALL = """\
version: 1
providers:
  nvidia:
    api: openai
    base_url: https://integrate.api.nvidia.com/v1
    key: ${NVIDIA_API_KEY}
    key_prefixes: [nvapi-]
  openrouter: {api: openai, base_url: https://openrouter.ai/api/v1, vendor_names: true}
  openai:
    api: openai
    base_url: https://api.openai.com/v1
    model_prefixes: [gpt-]
models:
  one: {context: 1000, targets: [{provider: nvidia, model: vendor/one}]}
  nvidia/*: {targets: [{provider: nvidia}]}
"""


@pytest.fixture
def write(tmp_path: Path):
    """Return a function that writes rules.yaml (and .env) and gives the path."""

    def write(text: str | bytes, dotenv: str | bytes | None = None) -> Path:
        path = tmp_path / "rules.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        if dotenv is not None:
            (tmp_path / ".env").write_bytes(
                dotenv if isinstance(dotenv, bytes) else dotenv.encode()
            )
        return path

    return write


@pytest.fixture
def load(write):
    def load(
        text: str | bytes, env: dict[str, str] | None = None, dotenv: str | bytes | None = None
    ) -> Rules:
        return rules.load(write(text, dotenv), env or {})

    return load


@pytest.fixture
def wrong(load):
    """Return a function that gives the lines of the error for a text."""

    def wrong(
        text: str | bytes, env: dict[str, str] | None = None, dotenv: str | bytes | None = None
    ) -> list[str]:
        with pytest.raises(RulesError) as raised:
            load(text, env, dotenv)
        assert [str(problem) for problem in raised.value.problems] == str(raised.value).split("\n")
        return str(raised.value).split("\n")

    return wrong


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Rules:
    # A copy, so that no developer's own .env is read.
    path = tmp_path_factory.mktemp("shipped") / "rules.yaml"
    path.write_bytes(SHIPPED.read_bytes())
    return rules.load(path, {})


# The shipped file

TABLE = """\
kimi-code/kimi-for-coding 262144
nvidia/kimi-k2.5 -> moonshotai/kimi-k2.5 262144
nvidia/kimi-k2-thinking -> moonshotai/kimi-k2-thinking 262144
mistral/codestral-2501 262144
mistral/mistral-large-2411 131072
mistral/pixtral-large-2411 131072
mistral/ministral-8b-2410 32768
openrouter/aurora-alpha -> openrouter/aurora-alpha 128000
siliconflow/qwen3-32b -> Qwen/Qwen3-32B 131072
siliconflow/deepseek-v3.2 -> deepseek-ai/DeepSeek-V3.2 164000
groq/compound -> groq/compound 131072
groq/qwen3-32b -> qwen/qwen3-32b 131072
groq/gpt-oss-120b -> openai/gpt-oss-120b 131072
cerebras/qwen3-235b -> qwen-3-235b-a22b-instruct-2507 65536
cerebras/gpt-oss-120b 65536
cerebras/glm-4.7 -> zai-glm-4.7 64000
gemini/gemini-2.5-flash-lite 1048576
gemini/gemini-3-flash-preview 1048576
gemini/gemini-2.5-flash 1048576
gemini/gemini-2.5-pro 1048576
"""


@pytest.mark.parametrize("row", TABLE.splitlines())
def test_the_model_table_holds(shipped: Rules, row: str) -> None:
    name, *rest = row.split()
    provider, own_name = name.split("/", 1)
    found = shipped.match(name)
    assert found is not None
    assert found.context == int(rest[-1])
    assert [(target.provider.name, target.model) for target in found.targets] == [
        (provider, rest[1] if rest[0] == "->" else own_name)
    ]
    assert name in [rule.name for rule in shipped.offered()]


def test_the_shipped_file_has_twelve_providers_with_their_limits(shipped: Rules) -> None:
    assert {name: (p.rpm, p.timeout) for name, p in shipped.providers.items()} == {
        "kimi-code": (40, 120),
        "nvidia": (40, 150),
        "mistral": (60, 120),
        "openrouter": (30, 150),
        "siliconflow": (100, 120),
        "groq": (100, 60),
        "cerebras": (100, 60),
        "gemini": (60, 180),
        "moonshot": (None, 120),
        "anthropic": (None, 120),
        "openai": (None, 120),
        "vertex": (None, 120),
    }
    assert {p.connect_timeout for p in shipped.providers.values()} == {10}
    assert (shipped.limits.warn_at, shipped.limits.critical_at) == (0.875, 0.95)
    assert [p.name for p in shipped.providers.values() if not p.stream_usage] == ["mistral"]


def test_every_provider_of_the_shipped_file_has_a_pattern_of_its_name(shipped: Rules) -> None:
    for name in shipped.providers:
        found = shipped.match(f"{name}/some/model-1")
        assert found is not None
        assert [(t.provider.name, t.model) for t in found.targets] == [(name, "some/model-1")]


@pytest.mark.parametrize(
    "model",
    [
        "gpt-5",
        "o3-mini",
        "claude-opus-4-1",
        "gemini-2.5-pro",
        "kimi-k2-thinking",
        "kimi-for-coding",
    ],
)
def test_the_makers_own_names_are_not_rerouted(shipped: Rules, model: str) -> None:
    assert shipped.match(model) is None


@pytest.mark.parametrize(
    ("model", "markup"),
    [
        ("kimi-code/kimi-for-coding", "kimi-k2"),
        ("nvidia/kimi-k2.5", "kimi-k2"),
        ("kimi-k2-thinking", "kimi-k2"),
        ("kimi-for-coding", "kimi-k2"),
        ("groq/moonshotai/kimi-k2-instruct", "kimi-k2"),
        ("siliconflow/Pro/moonshotai/Kimi-K2.5", "kimi-k2"),
        ("moonshot/kimi-k3", "kimi-k3"),
        ("openai/gpt-5", None),
    ],
)
def test_kimi_models_are_known_by_their_markup(
    shipped: Rules, model: str, markup: str | None
) -> None:
    said = shipped.about(model)
    assert said is not None
    assert said.markup == markup


def test_the_shipped_file_satisfies_its_schema() -> None:
    schema = rules.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(SHIPPED.read_text()), schema)


def test_all_that_is_commented_out_in_the_shipped_file_is_right(load) -> None:
    text = SHIPPED.read_text()
    text = text.replace("routing: []\n#  - {", "routing:\n  - {")
    text = text.replace("limits: {warn_at", "# limits: {warn_at")
    text = text.replace("# limits: {requests", "limits: {requests")
    text = text.replace("# default_model:", "default_model:")
    for name in ("local", "my-kimi"):
        start = text.index(f"  # {name}:")
        end = text.index("\n\n", start)
        text = (
            text[:start]
            + text[start:end].replace("\n  # ", "\n  ").replace("# ", "", 1)
            + text[end:]
        )
    loaded = load(text)
    assert loaded.providers["local"].takes_key is False
    assert loaded.models["my-kimi"].strategy == "weighted_random"
    assert loaded.default_model == "kimi-code/kimi-for-coding"
    assert loaded.routing[0].when.tools is False
    assert loaded.limits.budgets[0].usd == 5.0


def test_the_example_of_dotenv_has_each_variable_once_and_changes_nothing(load) -> None:
    example = (CHECKOUT / ".env.example").read_text()
    lines = example.splitlines()
    names = [line.removesuffix("=") for line in lines if re.fullmatch(r"[A-Z_]+=", line)]
    used = set(re.findall(r"\$\{([A-Z_]+)\}", SHIPPED.read_text())) - {"NAME"}
    assert Counter(names) == Counter(used | set(rules.settings()))
    for number, line in enumerate(lines):
        assert not line or line.startswith("#") or lines[number - 1].startswith("#")
    loaded = load(SHIPPED.read_text(), dotenv=example)
    assert loaded.default_model is None
    assert all(provider.key is None for provider in loaded.providers.values())


# The schema

WRONG_FOR_THE_SCHEMA = [
    ("rpm: 40", "rpm: fast"),
    ("timeout: 120", "timeout: 30"),
    ("api: openai", "api: opnai"),
    ("    key: ${KIMI", "    kee: ${KIMI"),
    ("default_strategy: first", "default_strategy: last"),
    ("sticky: true", "sticky: maybe"),
]


@pytest.mark.parametrize(("right", "bad"), WRONG_FOR_THE_SCHEMA)
def test_the_schema_refuses_what_loading_refuses(wrong, right: str, bad: str) -> None:
    text = SHIPPED.read_text()
    assert right in text
    text = text.replace(right, bad, 1)
    assert wrong(text)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), rules.json_schema())


def test_each_key_of_the_schema_has_a_description_and_a_type() -> None:
    schema = rules.json_schema()
    assert "title" not in schema["properties"]["providers"]
    for definition in [schema, *schema["$defs"].values()]:
        assert definition["description"].endswith(".")
        assert definition["additionalProperties"] is False
        for name, key in definition["properties"].items():
            if "$ref" in key:
                key = schema["$defs"][key["$ref"].removeprefix("#/$defs/")] | key
            assert key["description"].endswith("."), name
            assert "type" in key, name
            assert (
                "default" in key
                or name in definition.get("required", [])
                or key["type"] in ("object", "array")
            ), name


def test_the_schema_is_printed_by_the_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kimi_core.rules"],
        cwd=CHECKOUT / "addons",
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    )
    assert yaml.safe_load(done.stdout) == rules.json_schema()


# What is wrong, and where

WRONG = {
    "a word for a number": (
        SMALL.replace("    key: $", "    rpm: fast\n    key: $"),
        'rules.yaml:6: providers.nvidia.rpm: "fast" is not a whole number; write e.g. 40',
    ),
    "a fraction for a whole number": (
        SMALL.replace("    key: $", "    rpm: 1.5\n    key: $"),
        "rules.yaml:6: providers.nvidia.rpm: 1.5 is not a whole number; write e.g. 40",
    ),
    "a timeout out of range": (
        SMALL.replace("    key: $", "    timeout: 5\n    key: $"),
        "rules.yaml:6: providers.nvidia.timeout: 5 is out of range; write 60 to 300",
    ),
    "not a number at all": (
        SMALL.replace("    key: $", "    timeout: .nan\n    key: $"),
        "rules.yaml:6: providers.nvidia.timeout: .nan is not a finite number; write e.g. 120",
    ),
    "a word for a boolean": (
        SMALL + "sticky: maybe\n",
        'rules.yaml:16: sticky: "maybe" is neither true nor false; write e.g. true',
    ),
    "a number for a text": (
        SMALL.replace("model: vendor/one", "model: 4.10"),
        'rules.yaml:14: models.one.targets[0].model: 4.10 is not a text; put it in quotes: "4.10"',
    ),
    "a text for a mapping": (
        SMALL + "sanitizer: off please\n",
        'rules.yaml:16: sanitizer: "off please" is not a mapping',
    ),
    "a mapping for a list": (
        SMALL + "routing: {when: {}}\n",
        "rules.yaml:16: routing: a mapping is not a list; "
        'write e.g. [{"when": {"model": "claude-opus-*"}, "use": "claude-haiku"}]',
    ),
    "an unknown dialect": (
        SMALL.replace("api: openai\n", "api: opnai\n", 1),
        'rules.yaml:4: providers.nvidia.api: "opnai" is not allowed; did you mean openai?',
    ),
    "a dialect like no other": (
        SMALL.replace("api: openai\n", "api: grpc\n", 1),
        'rules.yaml:4: providers.nvidia.api: "grpc" is not allowed; '
        "write openai, responses, anthropic or gemini",
    ),
    "an unknown strategy": (
        SMALL + "default_strategy: round-robin\n",
        'rules.yaml:16: default_strategy: "round-robin" is not allowed; did you mean round_robin?',
    ),
    "an unknown key at the top": (
        SMALL + "provider: {}\n",
        "rules.yaml:16: provider: is no key of rules.yaml; did you mean providers?",
    ),
    "an unknown key of a provider": (
        SMALL.replace("    key: $", "    baseurl: x\n    key: $"),
        "rules.yaml:6: providers.nvidia.baseurl: is no key of rules.yaml; did you mean base_url?",
    ),
    "an unknown key like no other": (
        SMALL + "limits: {xyzzy: 1}\n",
        "rules.yaml:16: limits.xyzzy: is no key of rules.yaml; the keys here are: "
        "requests_per_minute, warn_at, critical_at, budgets",
    ),
    "an unknown key of a target": (
        SMALL.replace("model: vendor/one", "modle: vendor/one"),
        "rules.yaml:14: models.one.targets[0].modle: is no key of rules.yaml; did you mean model?",
    ),
    "a missing base_url": (
        SMALL.replace("    base_url: https://api.openai.com/v1\n", ""),
        "rules.yaml:9: providers.openai: base_url is missing; "
        'write e.g. "https://api.openai.com/v1"',
    ),
    "a missing api": (
        SMALL.replace("  openai:\n    api: openai\n", "  openai:\n"),
        "rules.yaml:9: providers.openai: api is missing; "
        "write openai, responses, anthropic or gemini",
    ),
    "a missing provider of a target": (
        SMALL.replace("{provider: nvidia, model: vendor/one}", "{model: vendor/one}"),
        'rules.yaml:14: models.one.targets[0]: provider is missing; write e.g. "nvidia"',
    ),
    "an empty base_url": (
        SMALL.replace("https://api.openai.com/v1", '""'),
        "rules.yaml:11: providers.openai.base_url: is empty; write e.g. https://api.openai.com/v1",
    ),
    "a base_url that is null": (
        SMALL.replace("https://api.openai.com/v1", ""),
        'rules.yaml:11: providers.openai.base_url: is empty; write e.g. "https://api.openai.com/v1"',
    ),
    "a base_url without scheme": (
        SMALL.replace("https://api.openai.com/v1", "api.openai.com/v1"),
        'rules.yaml:11: providers.openai.base_url: "api.openai.com/v1" is not an absolute http or '
        "https URL; write e.g. https://api.openai.com/v1",
    ),
    "a base_url of another scheme": (
        SMALL.replace("https://api.openai.com/v1", "ftp://api.openai.com/v1"),
        'rules.yaml:11: providers.openai.base_url: "ftp://api.openai.com/v1" is not an absolute '
        "http or https URL; write e.g. https://api.openai.com/v1",
    ),
    "a base_url with a query": (
        SMALL.replace("https://api.openai.com/v1", "https://api.openai.com/v1?a=b"),
        'rules.yaml:11: providers.openai.base_url: "https://api.openai.com/v1?a=b" has a query or '
        "a fragment; let it end with the path",
    ),
    "a base_url with a password": (
        SMALL.replace("https://api.openai.com/v1", "https://me:hunter2@api.openai.com/v1"),
        "rules.yaml:11: providers.openai.base_url: carries a user name or password; "
        "give the key under key: instead",
    ),
    "a base_url with an endpoint": (
        SMALL.replace("https://api.openai.com/v1", "https://api.openai.com/v1/chat/completions"),
        'rules.yaml:11: providers.openai.base_url: "https://api.openai.com/v1/chat/completions" '
        'ends in an endpoint, which is added later; write "https://api.openai.com/v1"',
    ),
    "a base_url without host": (
        SMALL.replace("https://api.openai.com/v1", "https://:443/v1"),
        'rules.yaml:11: providers.openai.base_url: "https://:443/v1" names no host; '
        "write e.g. https://api.openai.com/v1",
    ),
    "a base_url with a port that is none": (
        SMALL.replace("https://api.openai.com/v1", "https://api.openai.com:99999/v1"),
        'rules.yaml:11: providers.openai.base_url: "https://api.openai.com:99999/v1" is not a URL; '
        "write e.g. https://api.openai.com/v1",
    ),
    "a variable half written": (
        SMALL.replace("https://api.openai.com/v1", "https://$HOST/v1"),
        "rules.yaml:11: providers.openai.base_url: has a $ that starts no ${NAME}; "
        "write e.g. ${NVIDIA_API_KEY}",
    ),
    "a further dialect that is the first": (
        SMALL.replace("    key: $", "    also: {openai: https://a.example/v1}\n    key: $"),
        "rules.yaml:3: providers.nvidia: also: names openai, which is its api: already; remove one",
    ),
    "a further dialect that is unknown": (
        SMALL.replace("    key: $", "    also: {antropic: https://a.example/v1}\n    key: $"),
        'rules.yaml:6: providers.nvidia.also.antropic: "antropic" is not allowed; '
        "did you mean anthropic?",
    ),
    "a provider that no path can name": (
        SMALL.replace("  openai:\n", "  open ai:\n"),
        'rules.yaml:9: providers."open ai": "open ai" cannot name a provider, since the name is '
        "part of a path; use letters, digits, '-', '_' and '.'",
    ),
    "a provider called as a path of ours": (
        SMALL.replace("  openai:\n", "  v1:\n"),
        'rules.yaml:9: providers.v1: "v1" cannot name a provider, since the proxy has a path of '
        "that name; write e.g. my-v1",
    ),
    "a host with a scheme": (
        SMALL.replace("    key: $", "    hosts: [https://a.example]\n    key: $"),
        'rules.yaml:6: providers.nvidia.hosts[0]: "https://a.example" is not a host name; write it '
        "without scheme, port and path, e.g. api.moonshot.cn",
    ),
    "a target of an unknown provider": (
        SMALL.replace("{provider: nvidia, model: vendor/one}", "{provider: nvidai}"),
        'rules.yaml:14: models.one.targets[0].provider: "nvidai" is no provider of this file; '
        "did you mean nvidia?",
    ),
    "a target of a provider like no other": (
        SMALL.replace("{provider: nvidia, model: vendor/one}", "{provider: xyzzy}"),
        'rules.yaml:14: models.one.targets[0].provider: "xyzzy" is no provider of this file; '
        "the providers are: nvidia, openrouter, openai",
    ),
    "a target's pattern without a pattern": (
        SMALL.replace("model: vendor/one", 'model: "vendor/*"'),
        'rules.yaml:14: models.one.targets[0].model: "vendor/*" is a pattern, but "one" is not; '
        "write the model's name at the provider",
    ),
    "a pattern with too many stars": (
        SMALL + '  "*a*b*c*": {}\n',
        'rules.yaml:16: models.*a*b*c*: "*a*b*c*" has more than 3 *; one is mostly enough',
    ),
    "a weight of nothing": (
        SMALL.replace("model: vendor/one", "weight: 0"),
        "rules.yaml:14: models.one.targets[0].weight: 0 is out of range; write more than 0",
    ),
    "a key prefix of two providers": (
        SMALL.replace("model_prefixes: [gpt-]", "key_prefixes: [nvapi-]"),
        'rules.yaml:12: providers.openai.key_prefixes[0]: "nvapi-" stands for nvidia already; '
        "remove one of them",
    ),
    "a default model that nobody serves": (
        SMALL + "default_model: onee\n",
        'rules.yaml:16: default_model: "onee" is a model that no rule with targets names; '
        "did you mean one?",
    ),
    "more attempts than five": (
        SMALL + "ensure_tool_call_max_attempts: 6\n",
        "rules.yaml:16: ensure_tool_call_max_attempts: 6 is out of range; write 1 to 5",
    ),
    "another version": (
        SMALL.replace("version: 1", "version: 2"),
        "rules.yaml:1: version: 2 is not allowed; write 1",
    ),
    "no providers": (
        "version: 1\nmodels: {}\n",
        "rules.yaml:1: the file: providers is missing; "
        'write e.g. {"local": {"api": "openai", "base_url": "http://127.0.0.1:11434/v1"}}',
    ),
    "providers with nothing in them": (
        "version: 1\nproviders: {}\n",
        "rules.yaml:2: providers: is empty; "
        'write e.g. {"local": {"api": "openai", "base_url": "http://127.0.0.1:11434/v1"}}',
    ),
    "a sanitizer that keeps more than it cuts": (
        SMALL + "sanitizer: {threshold: 100, keep: 200}\n",
        "rules.yaml:16: sanitizer: keep is 200 and threshold 100, so nothing would be cut; "
        "make keep the smaller one",
    ),
    "a share over one": (
        SMALL + "compression:\n  at: 85\n",
        "rules.yaml:17: compression.at: 85 is out of range; write more than 0, at most 1",
    ),
    "a budget without a sum": (
        SMALL + "limits:\n  budgets:\n    - per: day\n",
        "rules.yaml:18: limits.budgets[0]: limits nothing; add usd: or tokens:, e.g. usd: 5.0",
    ),
    "a budget of a year": (
        SMALL + "limits: {budgets: [{per: year, usd: 1}]}\n",
        'rules.yaml:16: limits.budgets[0].per: "year" is not allowed; write key, session or day',
    ),
    "a warning after the alarm": (
        SMALL + "limits: {warn_at: 0.99}\n",
        "rules.yaml:16: limits: warn_at 0.99 lies above critical_at 0.95; make it the smaller one",
    ),
    "a routing rule for everything": (
        SMALL + "routing:\n  - use: one\n    when: {}\n",
        "rules.yaml:18: routing[0].when: says nothing, so the rule would take every request; "
        'write e.g. {model: "claude-opus-*"}',
    ),
    "a routing rule for nothing": (
        SMALL + "routing:\n  - {use: one, when: {input_tokens_above: 9, input_tokens_below: 10}}\n",
        "rules.yaml:17: routing[0].when: no request has more than 9 and fewer than 10 input "
        "tokens; make input_tokens_below the larger one",
    ),
    "a routing rule to a pattern": (
        SMALL + 'routing:\n  - {use: "a*", when: {tools: true}}\n',
        'rules.yaml:17: routing[0]: use: "a*" is a pattern; write one model\'s name',
    ),
    "a memory server with two ways": (
        SMALL + "memory:\n  servers:\n    m: {command: a, url: http://127.0.0.1/mcp}\n",
        "rules.yaml:18: memory.servers.m: needs either command: or url:, not both",
    ),
    "a key written twice": (
        SMALL + "models: {}\n",
        "rules.yaml:16: models: stands in line 13 already; remove one of them",
    ),
    "an inner key written twice": (
        SMALL.replace("    key: $", "    api: gemini\n    key: $"),
        "rules.yaml:6: providers.nvidia.api: stands in line 4 already; remove one of them",
    ),
    "a tab": (
        SMALL + "limits:\n\trequests_per_minute: 1\n",
        "rules.yaml:17: a tab, where YAML wants spaces; indent with spaces",
    ),
    "an open bracket": (
        SMALL + "routing: [\n",
        "rules.yaml:17: is not YAML: while parsing a flow node: expected the node content, but "
        "found '<stream end>'",
    ),
    "an open quote": (
        SMALL.replace("https://api.openai.com/v1", '"https://api.openai.com/v1'),
        "rules.yaml:11: is not YAML: while scanning a quoted scalar: found unexpected "
        "end of stream",
    ),
    "an unknown alias": (
        SMALL + "limits: *none\n",
        "rules.yaml:16: is not YAML: found undefined alias 'none'",
    ),
    "an alias to itself": (
        SMALL + "limits: &me\n  budgets: [*me]\n",
        "rules.yaml:16: limits.budgets[0]: holds itself; remove the alias",
    ),
    "a second document": (
        SMALL + "---\na: b\n",
        "rules.yaml:16: a second document (---) begins here; put everything into one",
    ),
    "a tag": (
        SMALL + "limits: !python/object:os.system {}\n",
        "rules.yaml:16: limits: has a tag (!…); remove it",
    ),
    "a mapping as key": (
        SMALL + "limits: {{a: b}: c}\n",
        "rules.yaml:16: limits: has a key that is not a text",
    ),
    "a number that is none": (
        SMALL + "limits: {warn_at: !!float x}\n",
        "rules.yaml:16: limits.warn_at: cannot be read as float",
    ),
    "an empty file": ("", "rules.yaml:1: is empty; `kimi-proxy init` writes a file to start from"),
    "nothing but comments": (
        "# one\n# two\n",
        "rules.yaml:1: is empty; `kimi-proxy init` writes a file to start from",
    ),
    "a list": (
        "- version: 1\n",
        "rules.yaml:1: is not a mapping; write version: 1, providers: and so on",
    ),
    "a control character": (
        SMALL + "a: \x01\n",
        "rules.yaml:16: the character U+0001 is not allowed in YAML",
    ),
    "Latin-1": (
        SMALL.encode() + b"# \xe9\n",
        "rules.yaml:16: is not UTF-8; save the file as UTF-8",
    ),
    "too deep": (
        "a: " + "[" * 500,
        "rules.yaml:1: the file nests too deeply; rules need five levels",
    ),
}


@pytest.mark.parametrize(("text", "expected"), WRONG.values(), ids=list(WRONG))
def test_what_is_wrong_is_said_with_its_line(wrong, text: str | bytes, expected: str) -> None:
    assert wrong(text) == [expected]


def test_all_problems_are_listed_in_the_order_of_their_lines(wrong) -> None:
    text = (
        SMALL.replace("api: openai\n", "api: opnai\n", 1)
        .replace("model_prefixes", "model_prefix")
        .replace("{provider: nvidia, model: vendor/one}", "{provider: nvidai}")
    )
    assert [line.split(" ")[0] for line in wrong(text + "sticky: 1\nsticky: 2\n")] == [
        "rules.yaml:4:",
        "rules.yaml:12:",
        "rules.yaml:14:",
        "rules.yaml:16:",
        "rules.yaml:17:",
    ]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RulesError) as raised:
        rules.load(tmp_path / "rules.yaml", {})
    assert str(raised.value) == f"rules.yaml: there is no such file in {tmp_path}"
    assert raised.value.path == tmp_path / "rules.yaml"


def test_a_folder_in_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RulesError, match=r"cannot be read \(Is a directory\)"):
        rules.load(tmp_path, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_an_error(write) -> None:
    path = write(SMALL)
    path.chmod(0)
    with pytest.raises(RulesError, match=r"cannot be read \(Permission denied\)"):
        rules.load(path, {})


def test_a_file_too_long_is_not_read(wrong) -> None:
    assert wrong("#" * (1 << 20) + "\n") == ["rules.yaml: is longer than 1 MiB"]


def test_anchors_that_multiply_are_refused(wrong) -> None:
    text = SMALL + "a0: &a0 [x, x]\n"
    text += "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    assert wrong(text) == [
        "rules.yaml:1: the file holds more than 50000 values; do its anchors repeat?"
    ]


def test_anchors_and_merges_are_followed(load) -> None:
    loaded = load(
        "providers:\n"
        "  a: &base {api: openai, base_url: https://a.example/v1, rpm: 7}\n"
        "  b: {<<: *base, base_url: https://b.example/v1}\n"
        "  c: {rpm: 9, <<: [*base, {rpm: 8, timeout: 60}]}\n"
    )
    providers = loaded.providers
    assert (providers["b"].rpm, providers["b"].base_url) == (7, "https://b.example/v1")
    assert (providers["c"].rpm, providers["c"].timeout) == (9, 60)


def test_a_merged_value_is_reported_where_it_was_written(wrong) -> None:
    assert wrong(
        "providers:\n"
        "  a: &base\n"
        "    api: openai\n"
        "    rpm: fast\n"
        "    base_url: https://a.example/v1\n"
        "  b: {<<: *base}\n"
    ) == [
        'rules.yaml:4: providers.a.rpm: "fast" is not a whole number; write e.g. 40',
        'rules.yaml:4: providers.b.rpm: "fast" is not a whole number; write e.g. 40',
    ]


def test_a_section_with_nothing_but_comments_means_its_defaults(load) -> None:
    loaded = load(SMALL + "routing:\n#  - x\nlimits:\n  # requests_per_minute: 60\n")
    assert loaded.routing == ()
    assert loaded.limits.requests_per_minute is None


# Keys are never shown

KEY = "sk-ant-api03-plantedsecretplantedsecret"


@pytest.mark.parametrize(
    "text",
    [
        SMALL.replace("${NVIDIA_API_KEY}", f"[{KEY}]"),
        SMALL.replace("${NVIDIA_API_KEY}", f"{{a: {KEY}}}"),
        SMALL.replace("${NVIDIA_API_KEY}", f'"{KEY} x"'),
        SMALL.replace("${NVIDIA_API_KEY}", f"${{NAME}}{KEY}"),
        SMALL.replace("${NVIDIA_API_KEY}", f"${KEY}"),
        SMALL.replace("${NVIDIA_API_KEY}", f'"{KEY}'),
        SMALL.replace("${NVIDIA_API_KEY}", f"!{KEY} x"),
        SMALL.replace("${NVIDIA_API_KEY}", f"*{KEY}"),
        SMALL.replace("${NVIDIA_API_KEY}", f"{KEY}\n     b: c"),
        SMALL.replace("https://api.openai.com/v1", KEY),
        SMALL.replace("https://api.openai.com/v1", f"https://u:{KEY}@a.example/v1"),
        SMALL.replace("https://api.openai.com/v1", f"https://{KEY}:x@a.example:port"),
        SMALL.replace("https://api.openai.com/v1", f"https://a.example/?key={KEY}"),
        SMALL.replace("api: openai\n", f"api: {KEY}\n", 1),
        SMALL.replace("    key: $", f"    {KEY}: x\n    key: $"),
        SMALL.replace("  openai:\n", f"  {KEY}: 1\n  openai:\n"),
        SMALL + f"sticky: {KEY}\n",
        SMALL + f"default_model: {KEY}\n",
        SMALL + f"memory: {{servers: {{m: {{command: a, env: {{A: [{KEY}]}}}}}}}}\n",
        SMALL + f"memory: {{servers: {{m: {{url: x, headers: {{A: {{b: {KEY}}}}}}}}}}}\n",
    ],
)
def test_no_error_shows_a_key(wrong, text: str) -> None:
    assert "plantedsecret" not in "\n".join(wrong(text))


def test_a_key_of_digits_is_not_shown_either(wrong) -> None:
    assert wrong(SMALL.replace("${NVIDIA_API_KEY}", "1234567890123")) == [
        "rules.yaml:6: providers.nvidia.key: the value is not a text; write e.g. "
        '"${NVIDIA_API_KEY}"'
    ]


def test_a_key_without_a_known_form_in_the_wrong_place_is_not_shown(wrong) -> None:
    key = "Zk3vB9qLmW2xT7yHcR5nJ8pD4sF6gA1e"
    assert key not in "\n".join(wrong(SMALL.replace("https://api.openai.com/v1", key)))


def test_nothing_that_is_printed_shows_a_key(load) -> None:
    loaded = load(
        SMALL.replace("${NVIDIA_API_KEY}", KEY)
        + f"memory: {{servers: {{m: {{command: a, env: {{TOKEN: {KEY}}}}}}}}}\n"
    )
    provider = loaded.providers["nvidia"]
    assert provider.key is not None
    assert provider.key.reveal() == KEY
    for printed in (
        repr(loaded),
        str(loaded),
        repr(provider),
        f"{provider.key}",
        f"{provider.key!r:>9}",
    ):
        assert "plantedsecret" not in printed
    assert str(provider.key) == repr(provider.key) == "***"


def test_a_secret_is_copied_but_not_pickled() -> None:
    secret = Secret(KEY)
    assert copy.deepcopy({"a": secret})["a"] is copy.copy(secret) is secret
    assert secret == Secret(KEY) != Secret("other")
    assert len({secret, Secret(KEY)}) == 1
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(secret)


def test_secrets_are_the_keys_of_eight_characters_and_more(load) -> None:
    text = SMALL.replace("vendor_names: true", "key: short77")
    assert load(text, {"NVIDIA_API_KEY": "nvapi-long"}).secrets() == {"nvapi-long"}


# Variables


def test_a_key_comes_from_the_environment_before_dotenv(load) -> None:
    dotenv = "NVIDIA_API_KEY=nvapi-from-file\n"
    from_both = load(SMALL, {"NVIDIA_API_KEY": "nvapi-from-environment"}, dotenv)
    assert from_both.secrets() == {"nvapi-from-environment"}
    from_file = load(SMALL, {"NVIDIA_API_KEY": ""}, dotenv)
    assert from_file.secrets() == {"nvapi-from-file"}


def test_a_provider_tells_the_variable_of_its_key(load) -> None:
    loaded = load(SMALL)
    nvidia, openai = loaded.providers["nvidia"], loaded.providers["openai"]
    assert (nvidia.key, nvidia.key_variable, nvidia.takes_key) == (None, "NVIDIA_API_KEY", True)
    assert (openai.key, openai.key_variable, openai.takes_key) == (None, None, False)
    assert nvidia.problem is None


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("NVIDIA_API_KEY=nvapi-1", "nvapi-1"),
        ("export NVIDIA_API_KEY=nvapi-1", "nvapi-1"),
        ("NVIDIA_API_KEY = nvapi-1", "nvapi-1"),
        ("NVIDIA_API_KEY='nvapi-1' # mine", "nvapi-1"),
        ('NVIDIA_API_KEY="nvapi=1#x"', "nvapi=1#x"),
        ("NVIDIA_API_KEY=nvapi==", "nvapi=="),
        ("NVIDIA_API_KEY=nvapi-$HOME-${HOME}", "nvapi-$HOME-${HOME}"),
        ("\ufeffNVIDIA_API_KEY=nvapi-1\r\nOTHER=2\r\n", "nvapi-1"),
        ("NVIDIA_API_KEY", None),
        ("# NVIDIA_API_KEY=nvapi-1", None),
    ],
)
def test_dotenv_syntax(load, line: str, value: str | None) -> None:
    key = load(SMALL, dotenv=line).providers["nvidia"].key
    assert (key.reveal() if key else None) == value


def test_a_line_of_dotenv_that_is_no_setting_is_named_without_its_text(wrong) -> None:
    assert wrong(SMALL, dotenv=f"# comment\n\nA=1\n\n{KEY} {KEY}\n") == [
        ".env:5: is not a setting; write NAME=value, one to a line"
    ]


def test_dotenv_that_is_not_utf8_is_an_error(wrong) -> None:
    assert wrong(SMALL, dotenv=b"A=1\nB=\xe9\n") == [".env:2: is not UTF-8; save the file as UTF-8"]


def test_a_key_that_no_header_carries_makes_its_provider_unusable_only(load) -> None:
    loaded = load(SMALL, {"NVIDIA_API_KEY": "nvapi-é secret"})
    provider = loaded.providers["nvidia"]
    assert provider.key is None
    assert provider.problem == (
        "provider nvidia: NVIDIA_API_KEY has blanks or characters that no HTTP header carries; "
        "copy the key again"
    )


def test_a_base_url_is_filled_in_from_variables(load) -> None:
    vertex = load(
        SHIPPED.read_text(),
        {"VERTEX_PROJECT_ID": "p1"},
        "VERTEX_LOCATION=us-central1\nVERTEX_ACCESS_TOKEN=ya29.token\n",
    )
    provider = vertex.providers["vertex"]
    assert provider.problem is None
    assert provider.base_url == (
        "https://us-central1-aiplatform.googleapis.com/v1/projects/p1/locations/us-central1"
        "/endpoints/openapi"
    )
    assert "us-central1-aiplatform.googleapis.com" in vertex.hosts()


def test_a_base_url_whose_variable_is_not_set_makes_its_provider_unusable_only(
    shipped: Rules,
) -> None:
    vertex = shipped.providers["vertex"]
    assert vertex.problem == (
        "provider vertex: VERTEX_LOCATION and VERTEX_PROJECT_ID are not set; "
        "put them into the environment or into .env"
    )
    assert (vertex.base_url, vertex.dialects, vertex.url_for("openai")) == ("", (), None)
    assert [p.name for p in shipped.providers.values() if p.problem] == ["vertex"]


def test_a_variable_that_makes_no_url_makes_its_provider_unusable_only(load) -> None:
    text = SMALL.replace("https://api.openai.com/v1", "${BASE}")
    assert load(text, {"BASE": "http://127.0.0.1:1/v1/"}).providers["openai"].base_url == (
        "http://127.0.0.1:1/v1"
    )
    broken = load(text, {"BASE": "nonsense"}).providers["openai"]
    assert broken.base_url == ""
    assert broken.problem is not None
    assert broken.problem.startswith(
        'provider openai: its base URL, with BASE filled in, "nonsense" is not an absolute'
    )


def test_variables_go_before_the_file(load) -> None:
    loaded = load(
        SMALL + "default_model: one\nsanitizer: {threshold: 900}\n",
        {
            "PROXY_HOST": "0.0.0.0",
            "PROXY_PORT": "9090",
            "DEFAULT_MODEL": "nvidia/x",
            "STICKY": "false",
            "SANITIZER_THRESHOLD": "800",
            "COMPRESSION_AT": "1",
            "COMPRESSION_FROM_MESSAGES": "null",
        },
        "DEFAULT_STRATEGY=best\nENSURE_TOOL_CALL_MAX_ATTEMPTS=5\nPROXY_PORT=1\n",
    )
    assert (loaded.proxy_host, loaded.proxy_port) == ("0.0.0.0", 9090)
    assert (loaded.default_model, loaded.default_strategy) == ("nvidia/x", "best")
    assert (loaded.sticky, loaded.ensure_tool_call_max_attempts) == (False, 5)
    assert (loaded.sanitizer.threshold, loaded.sanitizer.keep) == (800, 500)
    assert (loaded.compression.at, loaded.compression.from_messages) == (1, None)


@pytest.mark.parametrize(
    ("env", "dotenv", "expected"),
    [
        (
            {"PROXY_PORT": "http"},
            "",
            'environment: PROXY_PORT: "http" is not a whole number; write e.g. 8080',
        ),
        (
            {"ENSURE_TOOL_CALL_MAX_ATTEMPTS": "9"},
            "",
            "environment: ENSURE_TOOL_CALL_MAX_ATTEMPTS: 9 is out of range; write 1 to 5",
        ),
        (
            {},
            "# mine\nDEFAULT_STRATEGY=frist\n",
            '.env:2: DEFAULT_STRATEGY: "frist" is not allowed; did you mean first?',
        ),
        (
            {"DEFAULT_MODEL": "onee"},
            "",
            'environment: DEFAULT_MODEL: "onee" is a model that no rule with targets names; '
            "did you mean one?",
        ),
        (
            {},
            "SANITIZER_THRESHOLD=lots",
            '.env:1: SANITIZER_THRESHOLD: "lots" is not a whole number; write e.g. 1000',
        ),
    ],
)
def test_a_wrong_variable_is_named(wrong, env: dict[str, str], dotenv: str, expected: str) -> None:
    assert wrong(SMALL, env, dotenv) == [expected]


# Looking up


def _targets(found: Match | None) -> list[tuple[str, str]] | None:
    return found and [(target.provider.name, target.model) for target in found.targets]


PATTERNS = """\
providers:
  a: {api: openai, base_url: https://a.example/v1}
  b: {api: openai, base_url: https://b.example/v1, vendor_names: true}
models:
  "*": {context: 5}
  a/*: {context: 10, ensure_tool_call: true, targets: [{provider: a}]}
  a/big-*: {targets: [{provider: b}, {provider: a, model: "v-*", weight: 3}], strategy: random}
  a/big-one: {context: 30, markup: kimi-k2}
  plain: {targets: [{provider: b}]}
  "turbo-*": {targets: [{provider: b}]}
  a/own: {targets: [{provider: a}]}
"""


@pytest.mark.parametrize(
    ("model", "targets"),
    [
        ("plain", [("b", "plain")]),
        ("a/small", [("a", "small")]),
        ("a/vendor/small", [("a", "vendor/small")]),
        ("a/big-two", [("b", "a/big-two"), ("a", "v-two")]),
        ("a/big-one", [("b", "a/big-one"), ("a", "v-one")]),
        ("a/own", [("a", "own")]),
        ("turbo-1", [("b", "turbo-1")]),
        ("Plain", None),
        ("other", None),
        ("a/*", [("a", "*")]),
        ("", None),
        ("a/" + "x" * 300, None),
    ],
)
def test_the_exact_name_counts_then_the_longest_pattern(
    load, model: str, targets: list[tuple[str, str]] | None
) -> None:
    assert _targets(load(PATTERNS).match(model)) == targets


def test_what_an_entry_leaves_out_the_next_that_fits_says(load) -> None:
    found = load(PATTERNS).match("a/big-one")
    assert found is not None
    assert (found.context, found.markup, found.strategy) == (30, "kimi-k2", "random")
    assert found.ensure_tool_call is True
    assert found.rule.name == "a/big-*"
    assert [target.weight for target in found.targets] == [1, 3]


def test_a_model_without_targets_is_known_but_not_served(load) -> None:
    loaded = load(PATTERNS)
    assert loaded.match("other") is None
    said = loaded.about("other")
    assert said is not None
    assert (said.context, said.targets, said.strategy) == (5, (), "first")


def test_vendor_names_sent_to_their_provider_are_not_read_as_patterns(load) -> None:
    loaded = load(PATTERNS)
    a, b = loaded.providers["a"], loaded.providers["b"]
    assert _targets(loaded.match("a/small", sent_to=b)) is None
    assert _targets(loaded.match("a/small", sent_to=a)) == [("a", "small")]
    assert _targets(loaded.match("a/own", sent_to=b)) == [("a", "own")]
    assert _targets(loaded.match("a/small")) == [("a", "small")]


def test_matches_are_remembered_within_bounds(load) -> None:
    loaded = load(PATTERNS)
    assert loaded.match("a/x") is loaded.match("a/x")
    for number in range(3000):
        loaded.match(f"a/{number}")
    assert len(loaded._answers) <= rules.MAX_ANSWERS


@pytest.mark.parametrize(
    ("path", "model", "key", "provider"),
    [
        ("groq", "claude-opus-4-1", "sk-ant-1", "groq"),
        ("nobody", "claude-opus-4-1", "sk-ant-1", None),
        (None, "claude-opus-4-1", "sk-proj-1", "anthropic"),
        (None, "gpt-5", "sk-ant-1", "openai"),
        (None, "gemini-2.5-pro", None, "gemini"),
        (None, "models/gemini-2.5-pro", None, "gemini"),
        (None, "kimi-for-coding", None, "kimi-code"),
        (None, "kimi-k2-thinking", None, "moonshot"),
        (None, "codestral-2501", None, "mistral"),
        (None, "unheard-of", "sk-ant-api03-1", "anthropic"),
        (None, "unheard-of", "sk-or-v1-1", "openrouter"),
        (None, "unheard-of", "sk-kimi-1", "kimi-code"),
        (None, "unheard-of", "nvapi-1", "nvidia"),
        (None, "unheard-of", "gsk_1", "groq"),
        (None, "unheard-of", "csk-1", "cerebras"),
        (None, "unheard-of", "AIzaSy1", "gemini"),
        (None, "unheard-of", "sk-proj-1", "openai"),
        (None, "unheard-of", "0123456789abcdef", None),
        (None, "unheard-of", "", None),
        (None, "", None, None),
    ],
)
def test_a_provider_is_found_by_path_then_model_then_key(
    shipped: Rules, path: str | None, model: str, key: str | None, provider: str | None
) -> None:
    found = shipped.detect(path, model, key)
    assert (found.name if found else None) == provider


@pytest.mark.parametrize(
    ("host", "provider"),
    [
        ("api.anthropic.com", "anthropic"),
        ("API.OpenAI.com.", "openai"),
        ("api.moonshot.cn", "moonshot"),
        ("codestral.mistral.ai", "mistral"),
        ("evil-api.openai.com", None),
        ("chatgpt.com", None),
        ("", None),
    ],
)
def test_a_provider_is_found_by_its_host(shipped: Rules, host: str, provider: str | None) -> None:
    found = shipped.providers_by_host(host)
    assert (found.name if found else None) == provider
    assert (host.lower().rstrip(".") in shipped.hosts()) is (provider is not None)


def test_two_providers_of_one_host_are_told_apart_by_port(load) -> None:
    loaded = load(
        "providers:\n"
        "  a: {api: openai, base_url: http://127.0.0.1:11434/v1}\n"
        "  b: {api: openai, base_url: 'http://127.0.0.1:8000/v1'}\n"
        "  c: {api: openai, base_url: 'https://c.example:8443/v1'}\n"
    )

    def name(host: str, port: int | None) -> str | None:
        found = loaded.providers_by_host(host, port)
        return found.name if found else None

    assert [name("127.0.0.1", port) for port in (None, 11434, 8000, 9)] == ["a", "a", "b", None]
    assert [name("c.example", port) for port in (None, 8443, 443)] == ["c", "c", "c"]
    assert loaded.hosts() == {"c.example"}


def test_a_provider_speaks_each_dialect_at_its_own_url(shipped: Rules) -> None:
    kimi, gemini = shipped.providers["kimi-code"], shipped.providers["gemini"]
    assert kimi.dialects == ("openai", "anthropic")
    assert kimi.url_for("anthropic") == "https://api.kimi.com/coding/v1"
    assert kimi.url_for("gemini") is None
    assert gemini.base_url == "https://generativelanguage.googleapis.com/v1beta/openai"
    assert gemini.url_for("gemini") == "https://generativelanguage.googleapis.com/v1beta"
    assert shipped.providers["openai"].url_for("responses") == "https://api.openai.com/v1"


def test_the_key_goes_where_the_dialect_wants_it(shipped: Rules) -> None:
    assert shipped.providers["anthropic"].key_header("anthropic") == "x-api-key"
    assert shipped.providers["moonshot"].key_header("anthropic") == "authorization"
    assert shipped.providers["gemini"].key_header("gemini") == "x-goog-api-key"
    assert shipped.providers["gemini"].key_header("openai") == "authorization"


def test_prices_of_the_rules_are_found_by_name_then_pattern(shipped: Rules) -> None:
    kimi = shipped.providers["kimi-code"]
    price = kimi.price("k3-256k")
    assert price is not None
    assert (price.input, price.cached_input, price.output) == (3, 0.30, 15)
    assert kimi.price("unknown") is None
    nvidia = shipped.providers["nvidia"].price("moonshotai/kimi-k2-thinking")
    assert nvidia is not None
    assert (nvidia.input, nvidia.cached_input, nvidia.output) == (0.60, 0.15, 2.5)


@pytest.mark.parametrize(
    ("base_url", "listening", "loops"),
    [
        ("http://127.0.0.1:8080/v1", ("127.0.0.1", 8080), True),
        ("http://localhost:8080/v1", ("127.0.0.1", 8080), True),
        ("http://127.0.0.1:8080/v1", ("", 8080), True),
        ("http://[::1]:8080/v1", ("0.0.0.0", 8080), True),
        ("http://127.1.2.3:8080/v1", ("::", 8080), True),
        ("http://[::ffff:127.0.0.1]:8080/v1", ("127.0.0.1", 8080), True),
        ("http://127.0.0.1/v1", ("127.0.0.1", 80), True),
        ("https://proxy.example/v1", ("Proxy.Example", 443), True),
        ("http://127.0.0.1:8081/v1", ("127.0.0.1", 8080), False),
        ("http://proxy.example:8080/v1", ("127.0.0.1", 8080), False),
    ],
)
def test_a_base_url_that_points_back_is_found(
    load, base_url: str, listening: tuple[str, int], loops: bool
) -> None:
    loaded = load(f"providers: {{a: {{api: openai, base_url: '{base_url}'}}}}")
    assert [provider.name for provider in loaded.points_at([listening])] == ["a"] * loops


# Choosing


@pytest.fixture
def pool(shipped: Rules) -> tuple[Target, ...]:
    names = ("groq", "nvidia", "openrouter")
    return tuple(
        Target(shipped.providers[name], "m", weight)
        for name, weight in zip(names, (1, 2, 7), strict=True)
    )


def _chosen(pool: tuple[Target, ...], strategy: rules.Strategy, count: int) -> Counter[str]:
    rng = random.Random(1)
    return Counter(
        rules.choose(pool, strategy, rng=rng, counter=number).provider.name
        for number in range(count)
    )


def test_first_and_round_robin_follow_the_order(pool: tuple[Target, ...]) -> None:
    assert _chosen(pool, "first", 9) == {"groq": 9}
    assert _chosen(pool, "round_robin", 9) == {"groq": 3, "nvidia": 3, "openrouter": 3}
    picked = [rules.choose(pool, "round_robin", rng=random.Random(), counter=n) for n in range(4)]
    assert [target.provider.name for target in picked] == ["groq", "nvidia", "openrouter", "groq"]


def test_random_is_even_and_weighted_random_follows_the_weights(pool: tuple[Target, ...]) -> None:
    even = _chosen(pool, "random", 3000)
    assert all(900 < even[name] < 1100 for name in ("groq", "nvidia", "openrouter"))
    weighted = _chosen(pool, "weighted_random", 3000)
    assert 220 < weighted["groq"] < 380
    assert 500 < weighted["nvidia"] < 700
    assert 1950 < weighted["openrouter"] < 2250


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({}, "groq"),
        ({"groq": Score(capacity=0.0), "nvidia": Score(capacity=0.1)}, "openrouter"),
        ({name: Score(capacity=0.0) for name in ("groq", "nvidia", "openrouter")}, "groq"),
        ({"groq": Score(1, 3.0, 1), "nvidia": Score(1, 0.6, 1)}, "nvidia"),
        (
            {"groq": Score(1, 1, 9), "nvidia": Score(1, 1, 3), "openrouter": Score(1, 1, 1)},
            "openrouter",
        ),
        ({"groq": Score(1, 1.0, 1.0), "nvidia": Score(1, 0.5, 2.0)}, "nvidia"),
        ({"nvidia": Score(1, 0.0, 1)}, "nvidia"),
        ({"groq": Score(float("nan"), float("nan"), float("inf"))}, "groq"),
    ],
)
def test_best_weighs_capacity_cost_and_latency(
    pool: tuple[Target, ...], scores: dict[str, Score], best: str
) -> None:
    chosen = rules.choose(pool, "best", rng=random.Random(), scores=scores)
    assert chosen.provider.name == best


def test_there_is_nothing_to_choose_from_no_targets() -> None:
    with pytest.raises(ValueError, match="no target"):
        rules.choose((), "first", rng=random.Random())


# Reloading


def _rewrite(path: Path, text: str) -> None:
    """Write a file as an editor does, so that its inode changes whatever the clock says."""
    other = path.with_suffix(".new")
    other.write_text(text)
    other.replace(path)


def test_a_file_that_did_not_change_is_not_read_again(write) -> None:
    file = RulesFile(write(SMALL), {})
    before = file.current
    assert file.refresh() is None
    assert file.current is before


def test_a_changed_file_is_read_again(write) -> None:
    path = write(SMALL)
    file = RulesFile(path, {})
    _rewrite(path, SMALL + "sticky: false\n")
    assert file.refresh() is None
    assert file.current.sticky is False


def test_a_wrong_file_keeps_the_old_rules_and_is_reported_once_per_change(write) -> None:
    path = write(SMALL)
    file = RulesFile(path, {})
    before = file.current
    _rewrite(path, SMALL + "sticky: maybe\n")
    error = file.refresh()
    assert isinstance(error, RulesError)
    assert "rules.yaml:16: sticky" in str(error)
    assert file.refresh() is None
    assert file.problem is error
    assert file.current is before
    _rewrite(path, SMALL + "sticky: perhaps\n")
    assert isinstance(file.refresh(), RulesError)
    _rewrite(path, SMALL)
    assert file.refresh() is None
    assert file.problem is None
    assert file.current is not before


def test_a_file_that_is_removed_keeps_the_old_rules(write) -> None:
    path = write(SMALL)
    file = RulesFile(path, {})
    path.unlink()
    assert "there is no such file" in str(file.refresh())
    assert file.refresh() is None
    assert "nvidia" in file.current.providers


def test_a_changed_dotenv_is_read_again(write) -> None:
    path = write(SMALL)
    file = RulesFile(path, {})
    assert file.current.secrets() == frozenset()
    (path.parent / ".env").write_text("NVIDIA_API_KEY=nvapi-new-key\n")
    assert file.refresh() is None
    assert file.current.secrets() == {"nvapi-new-key"}


def test_a_file_wrong_from_the_start_raises(write) -> None:
    with pytest.raises(RulesError):
        RulesFile(write("a: b\n"), {})


def test_the_default_path_is_the_file_of_the_checkout() -> None:
    assert rules.default_rules_path() == SHIPPED


def test_the_default_path_of_an_installed_package_is_its_own_file(tmp_path: Path) -> None:
    for name, source in (
        ("kimi_core", CHECKOUT / "addons" / "kimi_core"),
        ("kimi_proxy", None),
    ):
        (tmp_path / name).mkdir()
        for file in source.glob("*.py") if source else ():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "kimi_proxy" / "rules.yaml").write_bytes(SHIPPED.read_bytes())
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from kimi_core import rules; path = rules.default_rules_path(); "
            "rules.load(path, {}); print(path)",
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    )
    assert Path(done.stdout.strip()) == tmp_path / "kimi_proxy" / "rules.yaml"


# Whatever the file holds

_WORDS = st.sampled_from(
    [
        *re.findall(r"[\w./*${}-]+", SMALL),
        *"{}[]:,&*!|>'\"%@`#?-\n\t ",
        "<<",
        "null",
        "~",
        ": ",
        "\n  ",
    ]
)
_TEXTS = st.text() | st.lists(_WORDS).map("".join)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | _WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS, inner, max_size=4),
    max_leaves=12,
)
_QUICKLY = hypothesis_settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def _loads_or_says_why(write, text: str | bytes, dotenv: str | bytes = "") -> None:
    problems: tuple[rules.Problem, ...] = ()
    path = write(text, dotenv)
    try:
        loaded = rules.load(path, {})
    except RulesError as error:
        problems = error.problems
        loaded = None
    assert (loaded is None) is bool(problems)
    for problem in problems:
        assert re.fullmatch(r"(rules\.yaml|\.env)(:[1-9]\d*)?|environment", problem.where)
        assert problem.what
    if loaded is not None:
        loaded.match("a/b")


@_QUICKLY
@given(text=_TEXTS)
def test_no_text_raises_anything_but_a_rules_error(write, text: str) -> None:
    _loads_or_says_why(write, text.encode("utf-8", "surrogatepass"))


@_QUICKLY
@given(text=st.binary(), dotenv=st.binary())
def test_no_bytes_raise_anything_but_a_rules_error(write, text: bytes, dotenv: bytes) -> None:
    _loads_or_says_why(write, SMALL.encode() + text, dotenv)


@_QUICKLY
@given(value=_VALUES, data=st.data())
def test_no_value_in_any_place_raises_anything_but_a_rules_error(write, value, data) -> None:
    document = yaml.safe_load(SMALL)
    document.update(
        {name: {} for name in ("sanitizer", "compression", "limits", "memory")} | {"routing": []}
    )
    place = document
    while isinstance(place, dict) and place:
        key = data.draw(st.sampled_from(sorted(map(str, place))) | _WORDS)
        if data.draw(st.booleans()) or not isinstance(place.get(key), dict):
            place[key] = value
            break
        place = place[key]
    _loads_or_says_why(write, yaml.safe_dump(document, allow_unicode=True))


@_QUICKLY
@given(cut=st.integers(0, len(SMALL)), more=_TEXTS)
def test_a_file_cut_or_mangled_anywhere_is_read_or_refused(write, cut: int, more: str) -> None:
    _loads_or_says_why(write, (SMALL[:cut] + more + SMALL[cut:]).encode("utf-8", "surrogatepass"))
