"""What holds for the whole of the package, whatever it computes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import potluck

ROOT = Path(potluck.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

WITHOUT_TORCH = [
    "potluck.errors",
    "potluck.contribution",
    "potluck.recipe",
    "potluck.corpus",
    "potluck.engine",
    "potluck.records.events",
    "potluck.records.live",
    "potluck.records.curves",
    "potluck.records.report",
    "potluck.records.card",
    "potluck.updates.sizes",
    "potluck.updates.fragments",
    "potluck.updates.framing",
    "potluck.traffic",
    "potluck.preflight",
    "potluck.footprint",
    "potluck.measured",
    "potluck.planning",
    "potluck.cli",
]
HEAVY = {"torch", "transformers", "datasets", "matplotlib"}

OTHER_PEOPLES_WORDS = {"client", "worker", "silo"}  # docs/design.md: ours is `participant`
UNPICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def in_file(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(params=FILES, ids=in_file)
def source(request: pytest.FixtureRequest) -> Path:
    return request.param


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def left_loaded(code: str) -> str:
    """What of the heavy libraries is loaded after ``code`` ran in a fresh interpreter."""
    check = f"{code}\nimport sys\nprint('loaded:', *sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("loaded:")[2].strip()


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_control_plane_imports_without_torch(module: str) -> None:
    assert left_loaded(f"import {module}") == ""


def test_help_answers_without_torch() -> None:
    ask = "import sys\nfrom potluck.cli import main\nsys.argv = ['potluck', '--help']\n"
    assert left_loaded(ask + "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code") == ""


def test_files_and_functions_stay_short(source: Path) -> None:
    assert len(source.read_text(encoding="utf-8").splitlines()) <= 400
    for node in nodes(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_every_module_says_what_it_is(source: Path) -> None:
    assert ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))


def test_every_room_is_a_package() -> None:
    """A folder without ``__init__.py`` imports from the source tree and is missing in the wheel."""
    assert [in_file(path.parent) for path in FILES if not (path.parent / "__init__.py").exists()] == []


def test_nothing_is_left_to_do(source: Path) -> None:
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", source.read_text(encoding="utf-8"))


def test_nothing_from_outside_can_run(source: Path) -> None:
    """No unpickling (``torch.load`` and ``allow_pickle`` are that too), no ``eval``, no ``exec``."""
    for node in nodes(source):
        match node:
            case ast.Import(names=names):
                assert not UNPICKLING & {alias.name.partition(".")[0] for alias in names}
            case ast.ImportFrom(module=str(module)):
                assert module.partition(".")[0] not in UNPICKLING
            case ast.Call(func=ast.Name(id=name)):
                assert name not in {"eval", "exec", "compile", "__import__"}
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)):
                assert name != "load"
            case ast.keyword(arg="allow_pickle" | "trust_remote_code", value=value):
                assert ast.unparse(value) == "False"


def words(text: str) -> set[str]:
    """The words of prose and of names, snake_case or CamelCase, in the singular."""
    return {word.lower().removesuffix("s") for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)}


def test_our_roles_have_our_names(source: Path) -> None:
    """In what we name and what we say; what other libraries name stays theirs."""
    said = [in_file(source)]
    for node in nodes(source):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                said.append(name)
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                said.append(name)
            case ast.Constant(value=str(text)):
                said.append(text)
    assert not OTHER_PEOPLES_WORDS & words(" ".join(said))
