"""The layers hold: thin addons over a core that knows no mitmproxy, and one order for all."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import docs
from docs import ROOT
from kimi_core.flows import Rank

ADDONS = ROOT / "addons"
CORE = sorted((ADDONS / "kimi_core").rglob("*.py"))
FILES = sorted(ADDONS.glob("*.py"))
CHAIN, COMMAND = ADDONS / "all.py", ADDONS / "cli.py"
EACH = [path for path in FILES if path not in (CHAIN, COMMAND)]

# A home, the folder of this checkout, or a package index of one's own: somebody's machine.
PLACES = re.compile(
    rf"(?<![\w.~}}])(?:/{'root'}|/{'home'}|{re.escape(str(ROOT))})/[\w.]"
    rf"|--(?:extra-)?{'index'}-url[ =]|--trusted-host[ =]|--{'find'}-links[ =]/"
)
HOMES_OF_NOBODY = ("/home/me", "/home/someone", "/home/user")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports anywhere in it, also within functions."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}:{node.lineno}: a relative import"
            yield node.module or ""


def _roots(path: Path) -> set[str]:
    return {module.partition(".")[0] for module in _imports(path)}


def _has_future_annotations(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.ImportFrom)
        and node.module == "__future__"
        and any(alias.name == "annotations" for alias in node.names)
        for node in tree.body
    )


def _decorators(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Return the names of a definition's decorators, without their modules and arguments."""
    found = []
    for decorator in node.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        found.append(getattr(called, "attr", getattr(called, "id", "")))
    return found


# --- who imports whom -----------------------------------------------------------------


@pytest.mark.parametrize("path", CORE, ids=_name)
def test_only_flows_knows_mitmproxy_in_the_core(path: Path) -> None:
    assert ("mitmproxy" in _roots(path)) == (path.name == "flows.py")


@pytest.mark.parametrize("path", CORE, ids=_name)
def test_the_core_knows_no_addon(path: Path) -> None:
    assert not _roots(path) & {file.stem for file in FILES}


@pytest.mark.parametrize("path", [*EACH, COMMAND], ids=_name)
def test_addons_and_the_command_import_no_addon(path: Path) -> None:
    assert not _roots(path) & {file.stem for file in FILES}


def test_the_chain_knows_every_addon_and_nothing_else() -> None:
    assert _roots(CHAIN) == {path.stem for path in EACH}


# --- what mitmproxy's loading of scripts asks for --------------------------------------


@pytest.mark.parametrize("path", [*FILES, *ADDONS.glob("*/")], ids=_name)
def test_nothing_in_addons_has_the_name_of_a_standard_module(path: Path) -> None:
    # `mitmdump -s addons/x.py` leaves the folder first on sys.path.
    assert path.stem not in sys.stdlib_module_names


def test_the_addons_folder_is_no_package() -> None:
    assert not (ADDONS / "__init__.py").exists()


@pytest.mark.parametrize("path", [*EACH, CHAIN], ids=_name)
def test_an_addon_file_ends_with_its_addons(path: Path) -> None:
    last = _tree(path).body[-1]
    assert isinstance(last, ast.Assign)
    assert [target.id for target in last.targets if isinstance(target, ast.Name)] == ["addons"]
    assert isinstance(last.value, ast.List)
    assert last.value.elts


@pytest.mark.parametrize("path", EACH, ids=_name)
def test_an_addon_file_has_no_dataclass_with_postponed_annotations(path: Path) -> None:
    # A script is not in sys.modules, where dataclasses would look its annotations up:
    # https://github.com/mitmproxy/mitmproxy/issues/8279
    tree = _tree(path)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    records = [node.name for node in classes if "dataclass" in _decorators(node)]
    assert not (records and _has_future_annotations(tree)), records


# --- order and failures ---------------------------------------------------------------


@pytest.mark.parametrize("event", ["request", "responseheaders", "response", "error"])
def test_the_order_of_the_chain_is_that_of_the_ranks(event: str) -> None:
    handlers = [getattr(type(addon), event, None) for addon in docs.chain()]
    ranks = [handler.rank for handler in handlers if hasattr(handler, "rank")]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == len(ranks), "two addons of one rank: their order would be chance"


def test_every_addon_of_the_chain_has_a_rank_of_its_own() -> None:
    of_each = [ranks for addon in docs.chain() if (ranks := _ranks(type(addon)))]
    assert len(of_each) == len(docs.chain()) - 1, "only HookCache sees no flow"
    assert all(len(ranks) == 1 for ranks in of_each)
    order = [rank for ranks in of_each for rank in ranks]
    assert order == sorted(set(order))


def _ranks(kind: type) -> set[Rank]:
    return {handler.rank for handler in vars(kind).values() if hasattr(handler, "rank")}


def _handlers() -> Iterator[tuple[str, list[str]]]:
    """Yield each handler of an event of a flow: where it is, and its decorators."""
    events = ("request", "requestheaders", "response", "responseheaders", "error")
    chained = {type(addon).__name__ for addon in docs.chain()}
    for path in EACH:
        for owner in _tree(path).body:
            if not (isinstance(owner, ast.ClassDef) and owner.name in chained):
                continue
            for node in owner.body:
                is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                if is_function and (node.name in events or "step" in _decorators(node)):
                    yield f"{_name(path)}:{node.name}", _decorators(node)


@pytest.mark.parametrize(("where", "decorators"), list(_handlers()))
def test_a_handler_is_a_step_and_names_what_its_failure_does(
    where: str, decorators: list[str]
) -> None:
    # Scripts share one guard in mitmproxy: an addon that raises silences those after it.
    assert decorators[0] == "step", f"{where}: its order would be that of loading"
    assert len({"fail_open", "fail_closed"} & set(decorators[1:])) == 1, where


def test_only_flows_and_the_pipe_catch_everything() -> None:
    broad = {
        f"{_name(path)}:{node.lineno}"
        for path in [*FILES, *CORE]
        if path.name not in ("flows.py", "pipe.py")
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.ExceptHandler) and _catches_everything(node)
    }
    assert not broad


def _catches_everything(handler: ast.ExceptHandler) -> bool:
    if any(isinstance(node, ast.Raise) and node.exc is None for node in handler.body):
        return False  # cleans up and passes it on
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        kind is None or getattr(kind, "id", "") in ("Exception", "BaseException") for kind in caught
    )


# --- what does not belong into the repository -----------------------------------------


def _kept_files() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_machines_folder_or_an_index() -> None:
    found = []
    for path in _kept_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            for place in HOMES_OF_NOBODY:
                line = line.replace(place, "")
            if path != Path(__file__) and PLACES.search(line):
                found.append(f"{_name(path)}:{number}")
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        f"cd /{'root'}/x",
        f"'/{'home'}/jo/.ssh'",
        f"{ROOT}/addons",
        f"--{'index'}-url=https://x",
    ],
)
def test_the_search_finds_what_it_is_for(line: str) -> None:
    assert PLACES.search(line)


@pytest.mark.parametrize("line", ["$HOME/.pki/home/x", "framework/home", "/homes/x"])
def test_the_search_leaves_other_paths_alone(line: str) -> None:
    assert not PLACES.search(line)
