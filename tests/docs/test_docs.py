"""The documentation says what is: its commands run, its links lead somewhere, its references are complete."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import potluck
from docs import _generate
from potluck import errors
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
