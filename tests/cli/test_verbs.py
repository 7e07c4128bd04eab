"""The command line: what it takes, what it prints, how it ends."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from potluck import errors

if TYPE_CHECKING:
    from tests.conftest import Events, Potluck, Tables

# Verbs and options are a promise: this list grows by decision, not by accident.
VERBS = {
    "init": ["NAME", "--data", "--json"],
    "check": ["RECIPE", "--set", "--json"],
    "plan": ["RECIPE", "--uplink", "--downlink", "--tokens-per-second", "--latency", "--set", "--plot", "--json"],
    "train": ["RECIPE", "--set", "--json"],
    "resume": ["RUN", "--round", "--json"],
    "compare": ["RECIPE", "--set", "--pooled", "--no-pooled", "--json"],
    "host": [
        "RECIPE",
        "--set",
        "--listen",
        "--advertise",
        "--server",
        "--certificate",
        "--key",
        "--rotate",
        "--insecure-loopback",
        "--json",
    ],
    "local": ["RECIPE", "--set", "--json"],
    "join": [
        "URL",
        "--invite",
        "--data",
        "--part",
        "--model",
        "--device",
        "--allow",
        "--max-local-steps",
        "--max-bytes",
        "--limit",
        "--folder",
        "--key",
        "--make-key",
        "--ask",
        "--json",
    ],
    "status": ["RUN", "--invite", "--watch", "--json"],
    "doctor": ["--invite", "--key", "--folder", "--json"],
    "evaluate": [
        "RUN_OR_MODEL",
        "--model",
        "--round",
        "--best",
        "--edits",
        "--forgotten",
        "--task",
        "--before",
        "--never",
        "--text",
        "--json",
    ],
    "generate": [
        "RUN_OR_MODEL",
        "--prompt",
        "--max-tokens",
        "--temperature",
        "--top-p",
        "--seed",
        "--raw",
        "--assistant",
        "--rule",
        "--deferral",
        "--threshold",
        "--draft",
        "--strength",
        "--plausibility",
        "--delimiter",
        "--api-key-env",
        "--json",
    ],
    "export": ["RUN", "--to", "--round", "--best", "--json"],
    "report": ["RUN", "--json"],
    "merge": [
        "PART...",
        "--out",
        "--method",
        "--weights",
        "--rank",
        "--into-base",
        "--statistics",
        "--base",
        "--data",
        "--density",
        "--lambda",
        "--epsilon",
        "--sign",
        "--divisor",
        "--select",
        "--energy",
        "--ridge",
        "--off-diagonal",
        "--floor",
        "--reweight-parameters",
        "--no-reweight-parameters",
        "--reweight-output",
        "--no-reweight-output",
        "--power",
        "--steps",
        "--seed",
        "--json",
    ],
    "library add": [
        "LIBRARY",
        "ADAPTER",
        "--base",
        "--data",
        "--name",
        "--who",
        "--licence",
        "--spec-points",
        "--noise",
        "--public",
        "--registry",
        "--replace",
        "--json",
    ],
    "library search": ["LIBRARY", "--base", "--data", "--mixture", "--top", "--registry", "--json"],
    "library list": ["LIBRARY", "--registry", "--json"],
    "library get": ["LIBRARY", "NAME", "--out", "--registry", "--json"],
    "library remove": ["LIBRARY", "NAME", "--registry", "--json"],
    "library cluster": ["LIBRARY", "--k", "--merge", "--rank", "--out", "--seed", "--registry", "--json"],
    "library route": [
        "LIBRARY",
        "--base",
        "--data",
        "--by",
        "--top-k",
        "--temperature",
        "--nearest",
        "--registry",
        "--json",
    ],
    "expert train": [
        "BASE",
        "--data",
        "--out",
        "--as",
        "--public",
        "--rank",
        "--steps",
        "--batch-size",
        "--sequence-length",
        "--learning-rate",
        "--seed",
        "--device",
        "--json",
    ],
    "expert assemble": [
        "BASE",
        "EXPERT...",
        "--out",
        "--top-k",
        "--bias",
        "--public",
        "--router-steps",
        "--seed",
        "--as",
        "--device",
        "--json",
    ],
    "expert remove": ["MODEL", "NAME", "--out", "--public", "--untuned", "--device", "--json"],
    "expert defer": [
        "RUN_OR_MODEL",
        "ASSISTANT...",
        "--data",
        "--out",
        "--rate",
        "--sequence-length",
        "--epochs",
        "--seed",
        "--api-key-env",
        "--json",
    ],
    "expert fuse": ["[NAME=]MODEL...", "--out", "--primary", "--width", "--seed", "--json"],
    "edit apply": [
        "MODEL",
        "--edits",
        "--out",
        "--method",
        "--layers",
        "--text",
        "--at",
        "--at-once",
        "--seed",
        "--strict",
        "--json",
    ],
    "edit revert": ["MODEL", "--id", "--out", "--json"],
    "edit locate": ["MODEL", "--facts", "--window", "--draws", "--plot", "--seed", "--json"],
    "edit world": ["--out", "--people", "--first", "--change", "--seed", "--json"],
    "forget": [
        "MODEL",
        "--forget",
        "--retain",
        "--method",
        "--out",
        "--task",
        "--refusals",
        "--text",
        "--layers",
        "--at",
        "--merge",
        "--refuse",
        "--epochs",
        "--batch-size",
        "--learning-rate",
        "--seed",
        "--expert",
        "--adapter",
        "--record",
        "--key",
        "--verify",
        "--opening",
        "--json",
    ],
}


def test_the_verbs_and_their_options() -> None:
    from typer.main import get_command

    from docs._generate import leaves
    from potluck.cli import app

    found = {}
    for name, command in leaves(get_command(app)):
        words: list[str] = []
        for parameter in command.params:
            is_option = parameter.param_type_name == "option"
            words += [*parameter.opts, *parameter.secondary_opts] if is_option else [str(parameter.metavar)]
            assert not is_option or parameter.help, f"{name} {parameter.name}"
            if parameter.type_descriptor.annotation is bool:
                assert parameter.metavar == "", f"{name} {parameter.name}: a flag takes no value"
        found[name] = words
        assert command.help
    assert found == VERBS


# --- a process of its own ----------------------------------------------------------------------


LINK = ["--uplink", "20mbit", "--downlink", "100mbit", "--latency", "50ms", "--tokens-per-second", "1000"]


@pytest.mark.parametrize(("verb", "key"), [(["check"], "rounds"), (["plan", *LINK], "choice")])
def test_foresight_needs_no_torch(recipe_file: Path, verb: list[str], key: str) -> None:
    code = (
        f"import sys\nsys.argv = ['potluck', *{verb!r}, {str(recipe_file)!r}, '--json']\n"
        "from potluck.cli import main\ntry:\n    main()\nfinally:\n"
        "    print(*({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, ""), done.stderr
    assert json.loads(done.stdout)[key]


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--version"], 0), (["-h"], 0), (["train", "--help"], 0), ([], 2), (["trian"], 2), (["train"], 2),
     (["check", "gone.toml"], 3), (["plan", "gone.toml", *LINK], 3),
     (["generate", "x", "--temperature", "-1"], 2)],
)  # fmt: skip
def test_the_installed_command(words: list[str], code: int, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("potluck")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "potluck.cli"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["check"], ["check", "--json"]])
def test_a_reader_that_goes_away_is_141(words: list[str], recipe_file: Path) -> None:
    command = ["-c", "from potluck.cli import main; main()", *words, *([recipe_file] if words[0] == "check" else [])]
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as verb:
        assert verb.stdout is not None and verb.stderr is not None
        verb.stdout.close()
        said = verb.stderr.read()
        assert verb.wait() == 141 and b"error" not in said and b"Traceback" not in said


# --- exit codes --------------------------------------------------------------------------------


def every_class(base: type[errors.PotluckError] = errors.PotluckError) -> Iterator[type[errors.PotluckError]]:
    yield base
    for inner in base.__subclasses__():
        yield from every_class(inner)


def test_exit_codes_are_what_is_written() -> None:
    rows = re.findall(r"^ *[├└│─ ]*(\w+) +(?:(\d+) +)?\S.*$", errors.__doc__.split("::")[1].split("Exit code")[0], re.M)
    written = {name: int(code) if code else None for name, code in rows}
    classes = {found.__name__: found for found in every_class()}
    assert set(written) == set(classes)
    for name, code in written.items():
        assert classes[name].exit_code == (code if code is not None else classes[name].__base__.exit_code), name
    own = [code for code in written.values() if code is not None]
    assert len(own) == len(set(own)) and not {0, 2} & set(own)


def test_every_error_has_a_sentence() -> None:
    assert all(inspect.getdoc(found) for found in every_class())


# --- JSON --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, potluck_in: Callable[[Path], Potluck], tables: Tables
) -> tuple[Path, Any]:
    """A finished run and what ``train --json`` printed."""
    verbs = potluck_in(tmp_path_factory.mktemp("trained"))
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, verbs("train", verbs.recipe(tables), "--set", f"records.folder={folder}", "--json").result


@pytest.fixture
def run(trained: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def test_train_prints_json(trained: tuple[Path, Any], events: Callable[..., Events]) -> None:
    folder, printed = trained
    assert set(printed) == {"run", "rounds", "total_tokens", "bits_per_byte", "model", "report"}
    assert (printed["run"], printed["rounds"], printed["total_tokens"]) == (str(folder), 3, 3 * 3 * 2 * 32)
    assert printed["bits_per_byte"] == events(folder, "evaluation")[-1]["union"]["bits_per_byte"]


def test_every_verb_prints_json(potluck: Potluck, run: Path, recipe_file: Path) -> None:
    assert potluck("check", recipe_file, "--json").result["participants"] == ["ada", "bob", "eve"]
    assert potluck("resume", run, "--json").result["rounds"] == 3
    assert potluck("evaluate", run, "--json").result["round"] == 3
    assert set(potluck("generate", run, "--max-tokens", 2, "--json").result) == {"prompt", "text"}
    assert potluck("export", run, "--to", "out", "--json").result == {"model": "out"}
    assert potluck("report", run, "--json").result == {"report": str(run / "report.html")}


def test_every_verb_speaks_to_people(potluck: Potluck, run: Path, recipe_file: Path) -> None:
    for words in (["check", recipe_file], ["resume", run], ["evaluate", run], ["export", run], ["report", run]):
        out = potluck(*words).out
        assert out.strip()
        with pytest.raises(json.JSONDecodeError):
            json.loads(out)


@pytest.mark.parametrize(
    ("words", "code"),
    [(["check", "gone.toml"], 3), (["train", "RECIPE", "--set", "rounds.cout=1"], 3), (["compare", "gone.toml"], 3),
     (["check", "RECIPE", "--set", "participants.0.source={path='gone'}"], 4), (["generate", "gone"], 5),
     (["resume", "gone"], 9), (["evaluate", "gone"], 9), (["export", "gone"], 9), (["report", "gone"], 9)],
)  # fmt: skip
def test_errors_are_json_too(potluck: Potluck, recipe_file: Path, words: list[str], code: int) -> None:
    ended = potluck(*[str(recipe_file) if word == "RECIPE" else word for word in words], "--json", code=code)
    assert set(ended.result) == {"error", "hint", "exit_code"}
    assert ended.result["exit_code"] == code and ended.result["error"] in ended.err.replace("\n", " ") + ended.err


# --- evaluate and generate ---------------------------------------------------------------------


def test_evaluate_repeats_the_runs_last_evaluation(potluck: Potluck, run: Path, events: Callable[..., Events]) -> None:
    said, logged = potluck("evaluate", run, "--json").result, events(run, "evaluation")[-1]
    assert said["participants"] == logged["participants"] and said["union"] == logged["union"]


def test_evaluate_gives_an_exported_model_the_same_number(potluck: Potluck, run: Path) -> None:
    ours = potluck("evaluate", run, "--json").result
    theirs = potluck("evaluate", run, "--model", run / "model", "--json").result
    for name, row in ours["participants"].items():
        assert theirs["participants"][name]["nats"] == pytest.approx(row["nats"], rel=1e-6)
        assert theirs["participants"][name]["tokens"] == row["tokens"]


def test_evaluate_of_an_earlier_round(potluck: Potluck, run: Path, events: Callable[..., Events]) -> None:
    assert potluck("evaluate", run, "--round", 2, "--json").result["union"] == events(run, "evaluation")[2]["union"]
    potluck("evaluate", run, "--round", 1, code=7)
    potluck("evaluate", run, "--model", run / "model", "--best", code=3)


def test_the_same_seed_writes_the_same_text(potluck: Potluck, run: Path) -> None:
    def text(*words: object) -> str:
        return str(potluck("generate", *words, "--prompt", "river ", "--max-tokens", 24, "--json").result["text"])

    assert text(run, "--seed", 1) == text(run, "--seed", 1) == text(run / "model", "--seed", 1)
    assert text(run, "--seed", 1) != text(run, "--seed", 2)
    assert text(run, "--temperature", 0, "--seed", 1) == text(run, "--temperature", 0, "--seed", 2)
    assert potluck("generate", run, "--prompt", "river ", "--max-tokens", 4).out.startswith("river ")


def test_a_plan_is_shown_printed_and_drawn(potluck: Potluck, recipe_file: Path, tmp_path: Path) -> None:
    said = potluck("plan", recipe_file, *LINK, "--json").result
    assert set(said) == {"link", "settings", "current", "choice", "reason", "tables"}
    assert said["link"] == {"steps_per_second": 1000 / 32, "uplink": 20.0, "downlink": 100.0, "latency": 50.0}
    assert said["choice"] in said["settings"] and said["current"] in said["settings"]
    shown = potluck("plan", recipe_file, *LINK, "--plot", tmp_path / "plan.svg").out
    assert said["reason"] in shown and "Quality is not predicted" in shown and "[updates" in shown
    assert (tmp_path / "plan.svg").read_text().count("<svg") == 1
    assert "not a bandwidth" in potluck("plan", recipe_file, "--uplink", "20mb", *LINK[2:], code=2).err
    assert "cannot be written" in potluck("plan", recipe_file, *LINK, "--plot", tmp_path / "plan.doc", code=8).err


def test_a_warning_does_not_disturb_the_json(potluck: Potluck, recipe_file: Path) -> None:
    odd = ("--set", "rounds.evaluate_every=9", "--set", "records.folder=odd", "--json")
    ended = potluck("train", recipe_file, *odd)
    assert "warning: rounds.evaluate_every 9" in ended.err and ended.result["rounds"] == 3
    assert potluck("check", recipe_file, *odd).result["warnings"]
