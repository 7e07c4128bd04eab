"""Text as people have it: `check` says ok if and only if the first round can be, and says what it leaves out."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from potluck.embedded import embedded_run, prepare
from potluck.errors import PotluckError
from potluck.preflight import forecast
from potluck.recipe import Recipe, parse_recipe
from potluck.records.events import read_events
from potluck.records.folder import Variant

if TYPE_CHECKING:
    from tests.conftest import Tables

PROSE = "The river rose in the night, and by noon the fields were under water. "
LONG = PROSE * 60  # 4 kB
Write = Callable[[Path], None]


@dataclass(frozen=True)
class Odd:
    """A participant's text.

    Attributes:
        write: Makes it in a folder.
        ends: What `check` and the first round come to: ``ok``, or words of the error of both.
        said: Words of what is told.
        evaluated: Whether some of it is held out.
        source: In place of the folder; paths are below it.
    """

    write: Write
    ends: str = "ok"
    said: tuple[str, ...] = ()
    evaluated: bool = True
    source: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    tokenizer: dict[str, Any] | None = None


def files(**contents: str | bytes) -> Write:
    """``name__suffix`` stands for ``name.suffix``."""

    def write(folder: Path) -> None:
        for name, content in contents.items():
            raw = content.encode() if isinstance(content, str) else content
            (folder / name.replace("__", ".")).write_bytes(raw)

    return write


def many(folder: Path) -> None:
    for number in range(30):
        (folder / f"{number}.txt").write_text(PROSE + str(number))


def huge_binary(folder: Path) -> None:
    many(folder)
    with (folder / "disk.img").open("wb") as file:
        file.truncate(300 << 20)


def huge_text(folder: Path) -> None:
    many(folder)
    with (folder / "dump.txt").open("wb") as file:
        file.write(LONG.encode() * 300)
        file.truncate((1 << 28) + 1)


def nothing_may_be_read(folder: Path) -> None:
    many(folder)
    os.mkfifo(folder / "pipe")
    (folder / "gone.txt").symlink_to(folder / "nowhere.txt")
    (folder / "loop").symlink_to(folder)


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


NUMBERED = [f"{PROSE}{number}" for number in range(30)]
LINES, FILE = {"jsonl": "a.jsonl"}, {"file": "a.txt"}
ENDS = "the end of each is held out"
RANDOM = zlib.compress(os.urandom(3000)).replace(b"\0", b"\1")
ODD = {
    "many": Odd(many),
    "one": Odd(files(a__txt=LONG), said=("its one document", ENDS)),
    "two": Odd(files(a__txt=LONG, b__txt=LONG[1:]), said=(ENDS,)),
    "three large ones": Odd(files(a__txt=LONG, b__txt=LONG[1:], c__txt=LONG[2:]), said=("its 3 documents", ENDS)),
    "one line": Odd(files(a__jsonl=rows(LONG)), source=LINES, said=(ENDS,)),
    "one that is too short": Odd(files(a__txt="x" * 20), "has 19 training tokens in 1 documents and needs 33"),
    "one of a byte": Odd(files(a__txt="x"), "has 0 training tokens"),
    "longer than the caps": Odd(
        files(**{f"f{n}__txt": f"{n}{LONG}" for n in range(9)}),
        data={"train_bytes": 600, "validation_bytes": 100},
        said=(ENDS,),
    ),
    "caps too small": Odd(many, "has 2 training tokens", data={"train_bytes": 1}),
    "nothing is to be held out": Odd(many, data={"validation_fraction": 0.0}, evaluated=False),
    "nearly all is held out": Odd(files(a__txt=LONG), said=(ENDS,), data={"validation_fraction": 0.99}),
    "no files": Odd(lambda folder: None, "holds no text"),
    "empty files": Odd(files(a__txt="", b__txt=" \n\t"), "holds no text"),
    "an empty JSON-lines file": Odd(files(a__jsonl=""), "holds no text", source=LINES),
    "binary files alone": Odd(files(a__png=b"\x89PNG\0\0", b__gz=gzip.compress(b"x" * 99)), "holds no text"),
    "binary files among texts": Odd(
        lambda folder: (many(folder), files(a__png=b"\x89PNG\0\0", b__bin=b"\0" * 99)(folder))[0],
        said=("a.png, b.bin are binary",),
    ),
    "a huge binary": Odd(huge_binary, said=("disk.img is binary",)),
    "a huge text": Odd(huge_text, "dump.txt is longer than 256 MiB"),
    "random bytes": Odd(lambda f: (many(f), files(a__bin=RANDOM)(f))[0], said=("a.bin",)),
    "Latin-1 alone": Odd(files(a__txt=("Flüsse " * 500).encode("latin-1")), "holds no text"),
    "Latin-1 among UTF-8": Odd(
        lambda f: (many(f), files(old__txt="Flüsse".encode("latin-1"))(f))[0],
        said=("old.txt is not UTF-8", "iconv -f WINDOWS-1252 -t UTF-8"),
    ),
    "UTF-8 with a mark": Odd(files(a__txt=LONG.encode("utf-8-sig")), said=(ENDS,)),
    "UTF-16": Odd(files(a__txt=LONG.encode("utf-16")), said=(ENDS,)),
    "UTF-16, the other way round": Odd(files(a__txt=b"\xfe\xff" + LONG.encode("utf-16-be")), said=(ENDS,)),
    "UTF-16 without a mark": Odd(files(a__txt=LONG.encode("utf-16-le")), "holds no text"),
    "UTF-32": Odd(files(a__txt=LONG.encode("utf-32")), said=(ENDS,)),
    "cut UTF-16": Odd(lambda f: (many(f), files(a__txt=b"\xff\xfea")(f))[0], said=("a.txt is binary",)),
    "lines with a mark": Odd(files(a__jsonl=rows(*NUMBERED).encode("utf-8-sig")), source=LINES),
    "lines in UTF-16": Odd(files(a__jsonl=rows(*NUMBERED).encode("utf-16")), source=LINES),
    "lines in Latin-1": Odd(
        files(a__jsonl=(rows(*NUMBERED) + '{"text": "ü"}\n').encode("latin-1")), "line 31 is not UTF-8", source=LINES
    ),
    "a bad row at the end": Odd(files(a__jsonl=rows(*NUMBERED) + "{"), "line 31 is not JSON", source=LINES),
    "a row of another form": Odd(
        files(a__jsonl=rows(*NUMBERED) + '{"body": 1}\n'), "line 31 has no field 'text'", source=LINES
    ),
    "nested rows": Odd(files(a__jsonl="[" * 200_000), "line 1 is not JSON", source=LINES),
    "half a character": Odd(files(a__jsonl=rows(*NUMBERED, "\ud800")), "not valid Unicode", source=LINES),
    "text before a separator": Odd(files(a__txt=LONG), "text before any line", source=FILE),
    "a separated file with a mark": Odd(
        files(a__txt=("".join(f"<<<FILE {n}>>>\n{PROSE}{n}\n" for n in range(30))).encode("utf-8-sig")), source=FILE
    ),
    "a folder for a file": Odd(many, "not a file", source={"jsonl": "."}),
    "a file for a folder": Odd(files(a__txt=LONG), said=(ENDS,), source={"path": "a.txt"}),
    "a pipe for a file": Odd(lambda f: os.mkfifo(f / "a.jsonl"), "not a file", source=LINES),
    "pipes and links among files": Odd(nothing_may_be_read),
    "few, for a BPE": Odd(files(a__txt=LONG), said=(ENDS,), tokenizer={"kind": "bpe", "vocab_size": 300}),
    "too few, for a BPE": Odd(
        files(a__txt="x " * 20), "training tokens in 1 documents", tokenizer={"kind": "bpe", "vocab_size": 300}
    ),
    "one among many participants": Odd(
        files(a__jsonl=rows(*NUMBERED)), "training tokens", source=LINES, data={"split": {"participants": 20}}
    ),
}


def recipe_of(odd: Odd, tables: Tables, folder: Path, shards: Path) -> Recipe:
    source = {key: str(folder / value) for key, value in (odd.source or {"path": "."}).items()}
    data = {"validation_fraction": 0.1, **(odd.data or {}), "shards": str(shards)}
    changes = {"tokenizer": odd.tokenizer or {"kind": "bytes"}, "rounds": {"count": 1, "local_steps": 1}}
    if "split" in data:
        data["source"] = source
        return parse_recipe({**{k: v for k, v in tables.items() if k != "participants"}, **changes, "data": data})
    people = [{"name": "eve", "source": source}]
    return parse_recipe({**tables, **changes, "data": data, "participants": people})


def first_round(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The last evaluation of a run of one round."""
    variant = Variant("together", recipe.participant_names)
    embedded_run(prepare(recipe, lambda _: None), variant, folder, recipe).finish(lambda: False)
    (done,) = [event for event in read_events(folder / "events.jsonl") if event["event"] == "round"]
    assert done["contributors"] == len(recipe.participant_names)
    return [event for event in read_events(folder / "events.jsonl") if event["event"] == "evaluation"][-1]


@pytest.mark.parametrize("name", ODD)
def test_check_says_what_the_first_round_comes_to(name: str, tables: Tables, tmp_path: Path) -> None:
    odd, folder = ODD[name], tmp_path / "texts"
    folder.mkdir()
    odd.write(folder)
    (tmp_path / "run").mkdir()
    checked, run = (recipe_of(odd, tables, folder, tmp_path / name) for name in ("checked", "trained"))
    if odd.ends == "ok":
        found = forecast(checked)
        for words in odd.said:
            assert any(words in warning for warning in found.warnings), found.warnings
        assert bool(first_round(run, tmp_path / "run")["participants"]) == odd.evaluated
        assert all(bool(text["validation_tokens"]) == odd.evaluated for text in found.texts.values() if text)
        return
    with pytest.raises(PotluckError, match=odd.ends) as before:
        forecast(checked)
    with pytest.raises(type(before.value)) as after:
        first_round(run, tmp_path / "run")
    assert str(after.value) == str(before.value)
