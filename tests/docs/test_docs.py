"""The documentation says what is: its commands run, its links lead somewhere, its references are complete."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import potluck
from docs import _generate
from potluck import errors, files
from potluck.cli import main
from potluck.embedded import embedded_run, prepare
from potluck.preflight import forecast
from potluck.recipe import load_recipe
from potluck.records.folder import Variant

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
RECIPES = sorted(ROOT.glob("recipes/*.toml"))
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>file|exit): (?P<value>\S+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
TINY = [
    "model={layers=4,width=32,heads=2,feedforward=64,context=64}",
    "tokenizer={kind='bytes'}",
    "local.batch_size=2",
    "local.sequence_length=32",
    "local.schedule.warmup_steps=0",
    "data.validation_fraction=0.5",
    "data.train_bytes=40000",
    "data.validation_bytes=20000",
    "rounds.local_steps=2",
]


@dataclass(frozen=True)
class Block:
    """A fenced block; ``mark`` says that it is a file to write, or what its last command exits with."""

    mark: str | None
    value: str | None
    language: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The potluck commands in it; what they print is not compared."""
        prompt = "$ " if self.language == "console" else ""
        lines = (line.removeprefix(prompt) for line in self.text.splitlines() if line.startswith(prompt))
        return [shlex.split(line, comments=True) for line in lines if line.startswith("potluck ")]


def blocks(page: Path) -> list[Block]:
    return [Block(**found.groupdict()) for found in FENCE.finditer(page.read_text(encoding="utf-8"))]


def runs(page: Path) -> bool:
    return any(b.language == "python" or (b.language in ("console", "bash") and b.commands) for b in blocks(page))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def run_command(command: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=name_of)
def test_what_a_page_shows_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written, commands and Python run, in the order of the page and in one folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for block in blocks(page):
        if block.mark == "file":
            assert block.value is not None
            Path(block.value).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec"), {"__name__": "__page__"})
        elif block.language in ("console", "bash"):
            codes = [run_command(command, monkeypatch) for command in block.commands]
            expected = [0] * len(codes)
            if block.mark == "exit":
                expected[-1] = int(block.value or 0)
            assert codes == expected, block.text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text)
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md") if path.name[0] != "_"}
    assert sorted(pages - set(re.findall(r"\]\(([^)#]+)\)", index))) == ["README.md"]


def test_pages_that_messages_name_are_installed(tmp_path: Path) -> None:
    """In a checkout and in a wheel; no message names a page in any other way."""
    for name in ("src", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('out'))"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    wheel = zipfile.ZipFile(next((tmp_path / "out").glob("*.whl"))).namelist()
    named = set()
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        owners = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        documented = {ast.get_docstring(node, clean=False) for node in owners}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "page":
                named.add(ast.literal_eval(node.args[0]))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in documented:
                other = re.search(r"(?<!`)\bdocs/[\w/-]+\.md", node.value)
                assert not other, f"{path}:{node.lineno}: name {other} by files.page"  # type: ignore[str-bytes-safe]
    assert len(named) >= 5
    for name in named:
        assert any(entry.endswith(f"/data/share/doc/potluck/{name}") for entry in wheel), name
        assert Path(files.page(name)) == ROOT / "docs" / name


def test_lower_bounds_are_what_is_tested_with() -> None:
    pins: dict[str, tuple[int, ...]] = {}
    for name in ("constraints.txt", "constraints-peers.txt"):
        for package, version in re.findall(r"^([\w.-]+)==([0-9.]+)$", (ROOT / name).read_text(), re.M):
            key, found = package.lower().replace("_", "-"), tuple(map(int, version.strip(".").split(".")))
            pins[key] = min(found, pins.get(key, found))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ("nats", "store", "postgres", "report", "datasets")
    wanted = [*project["dependencies"], *(item for extra in extras for item in project["optional-dependencies"][extra])]
    for requirement in wanted:
        package, bound = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([0-9.]+)", requirement).groups()  # type: ignore[union-attr]
        assert tuple(map(int, bound.split("."))) == pins[package], requirement


def test_the_generated_pages_are_up_to_date() -> None:
    """If not: python docs/_generate.py."""
    assert (_generate.REFERENCE / "recipe.md").read_text(encoding="utf-8") == _generate.recipe_page()
    assert (_generate.REFERENCE / "cli.md").read_text(encoding="utf-8") == _generate.cli_page()


def headings(page: str) -> str:
    lines = (ROOT / "docs/reference" / page).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def test_every_exit_code_has_a_section() -> None:
    found = headings("exit-codes.md")
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.PotluckError):
            assert re.search(rf"## {kind.exit_code}\b.*{name}\b", found) or f"### {name}" in found, name


def test_every_event_has_a_section() -> None:
    found = headings("events.md")
    source = Path(potluck.__file__).parent
    written = {
        kind
        for path in source.rglob("*.py")
        for kind in re.findall(r'log\.write\(\s*"(\w+)"', path.read_text(encoding="utf-8"))
    }
    assert len(written) >= 8
    assert {kind for kind in written if f"## {kind}" not in found} == set()


def small(path: Path) -> list[str]:
    """Settings that make a recipe's run a matter of seconds: fewer bytes and steps, and packages of little text."""
    recipe = load_recipe(path)
    packages = ["asyncio", "email", "encodings", "multiprocessing"]
    sources = [f"participants.{i}.source.package={packages[i % 4]}" for i in range(len(recipe.participants))]
    return [*TINY, *sources] if sources else [*TINY, "data.source={package='email'}", "data.split.participants=2"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes share their texts."""
    return tmp_path_factory.mktemp("shards")


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_can_be_run(path: Path, shards: Path, tmp_path: Path) -> None:
    forecast(load_recipe(path, [f"data.shards={shards}"]))
    rounds = load_recipe(path).fragments  # each of them once
    recipe = load_recipe(path, [*small(path), f"rounds.count={rounds}", f"data.shards={tmp_path / 'shards'}"])
    variant = Variant("together", recipe.participant_names)
    run = embedded_run(prepare(recipe, lambda _: None), variant, tmp_path, recipe)
    run.finish(lambda: False)
    assert run.shared.revision == rounds


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_tells_its_story(path: Path) -> None:
    comment = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for word in ("Story", "Source", "Run"):
        assert any(line.startswith(f"# {word} ") for line in comment), word
