"""The documentation is complete, fresh, and what it shows works."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from mitmproxy import flowfilter

import cli
import docs
import guard
import router
from docs import ROOT
from kimi_core import child_env, dialects, env, flows, process, rules, web
from kimi_core.tokens import tokenizer_for
from kimi_core.web.site import ROUTES
from proxy import PLANTED, Proxy, wait_until
from upstream import Upstream

README = docs.README.read_text(encoding="utf-8")
PAGES = (docs.README, ROOT / "CHANGELOG.md", ROOT / "certs" / "README.md")
SOURCES = sorted((ROOT / "addons").rglob("*.py"))

LANGUAGES = {"bash", "sh", "console", "python", "yaml", "http", "text", "bat", "dockerfile"}
MADE_AT_RUN_TIME = ("certs/mitmproxy-ca", "certs/bundle.pem", "certs/cacerts", ".env", ".venv")


# --- reading a page -------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is that of its fence."""

    page: Path
    line: int
    language: str
    text: str
    runnable: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def _blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(
        r"^(?P<mark><!-- runnable -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
    )
    for found in pattern.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        yield Block(page, line, found["language"], found["text"], bool(found["mark"]))


BLOCKS = [block for page in PAGES for block in _blocks(page)]


def _of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@cache
def _spans(page: Path = docs.README) -> frozenset[str]:
    """Return the code spans of a page, line breaks as blanks."""
    return frozenset(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", _prose(page)))


def _named_in_readme(names: Any) -> set[str]:
    """Return which of the names no code span has."""
    words = {word for span in _spans() for word in (span, *re.split(r"[\s=]", span))}
    return set(names) - words


def _rows_with(*header: str) -> list[docs.Row]:
    """Return the rows of the README table with this header."""
    start = README.index(f"| {' | '.join(header)} |")
    return docs.read_rows(README[start:].partition("\n\n")[0])


# --- generated tables and files -------------------------------------------------------


@pytest.mark.parametrize("name", docs.TABLES)
def test_a_generated_table_is_there_and_fresh(name: str) -> None:
    places = docs.places(README)
    assert name in places, f"README has no <!-- table: {name} -->"
    assert places[name] == docs.table(name, places[name]), "run `make docs`"


@pytest.mark.parametrize("name", docs.TABLES)
def test_each_row_of_a_generated_table_says_something(name: str) -> None:
    silent = [row[0] for row in docs.read_rows(docs.places(README)[name]) if not row[-1]]
    assert not silent, f"write a sentence for {silent} into README's table, or into the code"


def test_the_schema_file_is_that_of_the_rules_and_fresh() -> None:
    assert docs.SCHEMA.read_text(encoding="utf-8") == docs.schema(), "run `make docs`"


def test_the_first_line_of_rules_yaml_leads_to_the_schema() -> None:
    first = docs.RULES.read_text(encoding="utf-8").partition("\n")[0]
    found = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert found
    assert (docs.RULES.parent / found[1]).resolve() == docs.SCHEMA
    schema = yaml.safe_load(docs.SCHEMA.read_text(encoding="utf-8"))
    jsonschema.validate(yaml.safe_load(docs.RULES.read_text(encoding="utf-8")), schema)


# --- nothing is left out --------------------------------------------------------------


def test_each_addon_file_is_named() -> None:
    files = {f"addons/{path.name}" for path in (ROOT / "addons").glob("*.py")}
    assert not _named_in_readme(files - {"addons/cli.py"})


def test_each_command_of_mitmproxy_that_an_addon_adds_is_named() -> None:
    assert not _named_in_readme(docs.declared().commands)


def test_each_variable_that_the_code_reads_or_sets_is_named() -> None:
    shipped = docs.RULES.read_text(encoding="utf-8")
    keys = env.references(re.sub(r"(?m)#.*$", "", shipped))
    helps = {
        name
        for command in docs.subcommands().values()
        for option in command.params
        for name in re.findall(r"\[env: (\w+)\]", getattr(option, "help", None) or "")
    }
    set_for_clients = {
        *child_env.REPLACES_SYSTEM_CAS,
        *child_env.ADDS_CAS,
        *child_env.base_url_variables("http://127.0.0.1:1", {}),
    }
    read = {name for path in SOURCES for name in _variables_read(path)}
    assert {"KIMI_RULES", "XDG_STATE_HOME", "CONTINUE_GLOBAL_DIR"} <= read, "the search is broken"
    assert not _named_in_readme({*keys, *helps, *read, *set_for_clients, *rules.settings()})


def _variables_read(path: Path) -> Iterator[str]:
    """Yield the names that a source file looks up in an environment."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        owner: ast.expr | None = None
        key: ast.expr | None = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if node.func.attr in ("get", "getenv", "pop"):
                owner, key = node.func.value, node.args[0]
        elif isinstance(node, ast.Subscript):
            owner, key = node.value, node.slice
        name = getattr(owner, "attr", getattr(owner, "id", ""))
        if name in ("environ", "variables", "os") and isinstance(key, ast.Constant):
            yield str(key.value)


def test_each_route_of_the_stats_page_is_documented_and_no_other() -> None:
    routes = [pattern for pattern, _ in ROUTES if pattern != ".*"]
    rows = _rows_with("address", "query", "answer")
    shown = [path for row in rows for span in _code(row[0]) for path in [span.replace("ID", "x")]]
    shown += [span for row in rows for span in _code(row[2]) if span.startswith("/")]
    for pattern in routes:
        assert any(re.fullmatch(pattern, path) for path in shown), f"{pattern} is undocumented"
    for path in shown:
        assert any(re.fullmatch(pattern, path) for pattern in routes), f"there is no {path}"


def test_each_query_parameter_of_a_route_is_documented_and_no_other() -> None:
    taken = _query_parameters()
    for row in _rows_with("address", "query", "answer"):
        path = _code(row[0])[0].replace("ID", "x")
        handler = next(h for p, h in ROUTES if re.fullmatch(p, path))
        assert set(_code(row[1])) == taken.get(handler.__name__, set()), path


def _query_parameters() -> dict[str, set[str]]:
    """Return the names that each handler of the page asks its query for."""
    found: dict[str, set[str]] = {}
    files = Path(web.__file__).parent.glob("*.py")
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    for owner in (node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)):
        for call in (node for node in ast.walk(owner) if isinstance(node, ast.Call)):
            called = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            if called == "limit":
                found.setdefault(owner.name, set()).add("limit")
            elif called in ("argument", "get_query_argument"):
                names = [arg.value for arg in call.args[:1] if isinstance(arg, ast.Constant)]
                found.setdefault(owner.name, set()).update(map(str, names))
    assert found["Sessions"] == {"limit", "before", "project"}, "the search is broken"
    return found


def _code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_each_request_header_of_ours_is_documented_and_no_other() -> None:
    read = {_code(row[0])[0] for row in _rows_with("request header", "meaning")}
    assert read == set(flows.OWN_HEADERS)


def test_each_path_of_a_base_url_is_named() -> None:
    assert not _named_in_readme(router.PATHS)
    assert all(dialects.match("POST", p) or dialects.match("GET", p) for p in router.PATHS)


def test_each_header_that_is_redacted_is_named() -> None:
    assert not _named_in_readme(name.decode() for name in guard.SECRET_HEADERS)


def test_each_name_in_a_flows_metadata_is_documented_and_no_other() -> None:
    found = {
        node.value
        for name in (
            "addons/counter.py",
            "addons/enforcer.py",
            "addons/normalizer.py",
            "addons/views.py",
            "addons/kimi_core/flows.py",
        )
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.fullmatch(r"(gen_ai|kimi)\.[a-z_.]+", node.value)
    }
    said = re.search(r"A flow's metadata has (.*?)as far as they are known\.", README, re.S)
    assert said
    assert set(_code(said[1])) == found


# --- what is said is true -------------------------------------------------------------


@pytest.mark.parametrize("filter_", sorted(span for span in _spans() if span.startswith("~m")))
def test_a_filter_that_is_shown_is_one_of_mitmproxys(filter_: str) -> None:
    assert flowfilter.parse(filter_) is not None


def test_the_models_table_says_what_the_tokenizers_say() -> None:
    rows = _rows_with("models, for example", "vocabulary", "source")
    for models, vocabulary, source in rows:
        for model in _code(models):
            found = tokenizer_for(model)
            assert f"`{found.name}`" == vocabulary, model
            assert ("tokenizer" if found.exact else "estimate") in source, model
    assert {tokenizer_for(m).name for row in rows for m in _code(row[0])} >= {
        "o200k_base",
        "kimi_k2",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = _prose(page)
    for target in re.findall(r"\]\(\s*([^)\s]+)\s*\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        leads_to = (page.parent / name) if name else page
        assert leads_to.exists(), target
        if anchor:
            assert anchor in _anchors(leads_to), target


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"(?m)^#+ (.+)$", _prose(page))
    return {re.sub(r"[^\w\- ]", "", h.replace("`", "").lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    for span in _spans(page):
        for word in span.split():
            if re.match(r"(addons|tests|certs)/", word) and not word.startswith(MADE_AT_RUN_TIME):
                assert (ROOT / word).exists(), word


@cache
def _mitmproxy_options() -> frozenset[str]:
    """Return all options that mitmdump has with the chain loaded."""
    mitmdump = Path(sys.executable).with_name("mitmdump")
    done = subprocess.run([str(mitmdump), "--options"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return frozenset({*yaml.safe_load(done.stdout), *(o.name for o in docs.declared().options)})


def test_each_option_of_mitmproxy_that_is_named_exists() -> None:
    shown = set(re.findall(r"--set (\w+)=", README)) - {"NAME"}
    assert {"stats_port", "kimi_store"} <= shown
    assert shown | {"connection_strategy", "confdir", "listen_host"} <= _mitmproxy_options()
    assert not _named_in_readme({"connection_strategy", "confdir", "listen_host"})


# --- blocks ---------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_has_a_language_that_is_checked(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block}: say which language it is"


@pytest.mark.parametrize("block", _of("yaml"), ids=str)
def test_a_snippet_of_rules_is_right(block: Block, tmp_path: Path) -> None:
    whole = yaml.safe_load(docs.RULES.read_text(encoding="utf-8"))
    for section, value in yaml.safe_load(block.text).items():
        whole[section] = {**whole.get(section, {}), **value} if isinstance(value, dict) else value
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(whole), encoding="utf-8")
    loaded = rules.load(path, {})
    for model in yaml.safe_load(block.text).get("models", {}):
        assert loaded.match(model.replace("*", "x")) is not None


@pytest.mark.parametrize("block", _of("python"), ids=str)
def test_a_python_snippet_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("name", docs.subcommands())
def test_each_subcommand_has_help(name: str) -> None:
    said = CliRunner().invoke(cli.main, [name, "--help"])
    assert said.exit_code == 0
    assert "Usage:" in said.output


@dataclass(frozen=True)
class Shown:
    """A command that a page shows, in a block or in a code span."""

    where: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where} {' '.join(self.words)}"[:70]


def _commands() -> Iterator[Shown]:
    for block in _of("bash", "sh", "console"):
        lines = block.text.replace("\\\n", " ")
        if block.language == "console":
            lines = "\n".join(re.findall(r"(?m)^\$ (.*)$", lines))
        for words in _split(lines):
            yield Shown(str(block), words)
    for page in PAGES:
        for span in sorted(_spans(page)):
            if re.match(r"(kimi-proxy|make|mitmdump|mitmweb) [a-z-]", span):
                yield Shown(str(page.relative_to(ROOT)), tuple(shlex.split(span)))


def _split(script: str) -> Iterator[tuple[str, ...]]:
    """Yield the simple commands of a shell script, those in $( ) too."""
    for inner in re.findall(r"\$\(([^()]+)\)", script):
        yield from _split(inner)
    for line in script.splitlines():
        lexer = shlex.shlex(re.sub(r"\$\([^()]*\)", "x", line), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        lexer.commenters = "#"
        words: list[str] = []
        for token in [*lexer, ";"]:
            if set(token) <= set(";&|()<>"):
                command = words
                while command and re.match(r"[A-Za-z_]\w*=", command[0]):
                    command = command[1:]
                if command:
                    yield tuple(command)
                words = []
            else:
                words.append(token)


@pytest.mark.parametrize("shown", dict.fromkeys(_commands()), ids=str)
def test_a_command_that_is_shown_exists(shown: Shown) -> None:
    program, *arguments = shown.words
    program = program.removeprefix(".venv/bin/")
    if program == "kimi-proxy":
        _check_kimi_proxy(arguments)
    elif program == "make":
        _check_make(arguments)
    elif program in ("mitmdump", "mitmweb"):
        _check_mitmproxy(arguments)
    elif program == "cp":
        made = arguments[0].startswith((*MADE_AT_RUN_TIME, "$"))
        assert made or (ROOT / arguments[0]).exists(), arguments[0]


def _check_kimi_proxy(arguments: list[str]) -> None:
    if arguments[0] == "COMMAND":
        assert arguments[1:] == ["--help"]
        return
    command = docs.subcommands().get(arguments[0])
    assert command is not None, f"kimi-proxy has no {arguments[0]}"
    if arguments[1:] == [] and any(p.required for p in command.params):
        return  # prose that only names the command
    # Parses and checks the arguments as a call would, without calling anything.
    try:
        context = command.make_context(arguments[0], arguments[1:])
    except click.UsageError as error:
        pytest.fail(f"kimi-proxy {shlex.join(arguments)}: {error.format_message()}")
    # `run` takes what it does not know for the command to be run.
    assert not context.params.get("command", ("",))[0].startswith("-"), shlex.join(arguments)


def _check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"(?m)^([\w.-]+):", makefile)
    for argument in arguments:
        name, is_variable, _ = argument.partition("=")
        assert (f"$({name})" in makefile) if is_variable else argument in targets, argument


def _check_mitmproxy(arguments: list[str]) -> None:
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag == "-s":
            assert (ROOT / value).is_file(), value
        elif flag == "--set":
            assert value.partition("=")[0] in _mitmproxy_options(), value
        elif flag.startswith("--"):
            assert flag[2:].replace("-", "_") in _mitmproxy_options(), flag


# --- blocks that are run --------------------------------------------------------------


@dataclass(frozen=True)
class Live:
    """A proxy with the shipped rules and the stats page, before the fake provider."""

    proxy: Proxy
    stats_port: int

    def addressed(self, text: str) -> str:
        """Return `text` with the ports that this proxy has."""
        return text.replace("127.0.0.1:8080", f"127.0.0.1:{self.proxy.port}").replace(
            "127.0.0.1:8082", f"127.0.0.1:{self.stats_port}"
        )


@pytest.fixture(scope="module")
def live(provider: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder: Path = tmp_path_factory.mktemp("docs")
    port = process.free_port()
    proxy = Proxy(
        folder,
        provider,
        options=(f"stats_port={port}", "stats_token=a-token"),
        environment=dict.fromkeys(("NVIDIA_API_KEY", "ANTHROPIC_API_KEY"), PLANTED),
    )
    shutil.copy(docs.RULES, proxy.rules)
    with proxy:
        wait_until(lambda: process.accepts("127.0.0.1", port))
        yield Live(proxy, port)


RUNNABLE = [block for block in BLOCKS if block.runnable]


def test_blocks_are_run() -> None:
    assert {"bash", "python"} <= {block.language for block in RUNNABLE}
    for program in ("curl", "import openai", "import anthropic"):
        module = program.removeprefix("import ")
        assert any(module in block.text for block in RUNNABLE), f"no example of {module} is run"


@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_a_block_that_is_marked_as_runnable_works(
    block: Block, live: Live, up: Upstream, tmp_path: Path
) -> None:
    text = live.addressed(block.text)
    (tmp_path / "certs").symlink_to(live.proxy.confdir)
    if block.language == "python":
        command = [sys.executable, "-c", text]
    else:
        bash = shutil.which("bash")
        if bash is None or shutil.which("curl") is None:
            pytest.skip("bash or curl is not installed")
        command = [bash, "-euc", text.replace("curl -s", "curl --fail-with-body --max-time 20 -s")]
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**kept, "TOKEN": "a-token", "OPENAI_API_KEY": "sk-own-0123456789"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    if "Say hello" in text:
        assert "Say hello." in up.requests[-1].body.decode()
    if "api.openai.com" in text:
        assert (up.requests[-1].host, up.requests[-1].key) == (
            "api.openai.com",
            "sk-own-0123456789",
        )


HELLO = [{"role": "user", "content": "Say hello."}]


def _headers_of_ours(live: Live, stream: bool) -> dict[str, str]:
    body = {"model": "nvidia/kimi-k2.5", "messages": HELLO, "stream": stream}
    with live.proxy.base_client() as client:
        headers = client.post("/v1/chat/completions", json=body).headers
    return {name: value for name, value in headers.items() if name.startswith("x-kimi-proxy-")}


def test_the_headers_of_replies_are_documented_and_no_other(live: Live, up: Upstream) -> None:
    rows = _rows_with("reply header", "streamed", "meaning")
    documented = {_code(row[0])[0].lower(): row[1] for row in rows}
    assert set(_headers_of_ours(live, stream=False)) == set(documented)
    streamed = {name for name, when in documented.items() if when.startswith("yes")}
    assert set(_headers_of_ours(live, stream=True)) == streamed


def test_the_tour_shows_the_headers_of_a_reply(live: Live, up: Upstream) -> None:
    shown = next(block.text for block in _of("http"))
    headers = _headers_of_ours(live, stream=False)
    assert [name.lower() for name in re.findall(r"(?m)^([\w-]+):", shown)] == list(headers)
    assert f": {headers['x-kimi-proxy-model']}\n" in shown
