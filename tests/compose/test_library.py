"""A library in a folder and in an object store: entries in full or not at all, and the verbs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from potluck.compose.adapter import Adapter, Factors, load_adapter, save_adapter
from potluck.compose.base import Base, load_base
from potluck.compose.library.cards import Card, card_of
from potluck.compose.library.entries import (
    Library,
    adapter_of,
    add_entry,
    fetch_entry,
    known_card,
    open_library,
    remove_entry,
)
from potluck.compose.library.specification import Specification
from potluck.compose.library.storage import storage_at
from potluck.compose.library.yardstick import Yardstick
from potluck.corpus.tokenizer import vocabulary_from_words
from potluck.errors import MissingExtra, ModelError, RecipeError, StorageError
from potluck.models.export import export_folder
from potluck.recipe.schema import Bytes

if TYPE_CHECKING:
    from tests.conftest import Potluck

SECRET = "a-secret-of-the-test"
PATH = "model.layers.0.self_attn.q_proj"
Given = tuple[Card, dict[str, bytes]]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=256, initializer_range=0.3, **shape))
    vocabulary, folder = vocabulary_from_words({"a": 2}, 300), tmp_path_factory.mktemp("base") / "model"
    export_folder(model, Bytes(), vocabulary.tokenizer, vocabulary.end_of_text, folder)
    return folder


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Base:
    return load_base(base_folder)


@pytest.fixture(scope="module")
def begun(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty library."""
    folder = tmp_path_factory.mktemp("begun") / "library"
    open_library(str(folder), begun_with=base).close()
    return folder


def adapter_folder(folder: Path, seed: int = 0, rank: int = 2, base: Base | None = None) -> Path:
    draw = torch.Generator().manual_seed(seed)
    factors = Factors(torch.randn(rank, 32, generator=draw), torch.randn(32, rank, generator=draw))
    about = {} if base is None else {"base_hash": base.content_hash}
    save_adapter(Adapter({PATH: factors}, about=about), folder)
    return folder


def given(base: Base, yardstick: Yardstick, folder: Path, name: str, seed: int = 0, **more: Any) -> Given:
    points = torch.randn(3, len(yardstick.directions), generator=torch.Generator().manual_seed(seed))
    specification = Specification(
        points, torch.tensor([0.5, 0.25, 0.25]), yardstick.content_hash, more.pop("noise", 0.0)
    )
    return card_of(name, adapter_folder(folder / f"{name}-{seed}", seed), base, specification, **more)


# --- where it lies -------------------------------------------------------------------------------


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An S3 server on the loopback device; the folder in which the objects of ``s3://bucket`` lie as files."""
    localbucket = pytest.importorskip("localbucket")
    pytest.importorskip("obstore")

    class Handler(localbucket.S3Handler):  # type: ignore[misc, name-defined]
        data_root = tmp_path / "served"

        def _post_request(self, bucket: str, key: str) -> None:
            if "delete" not in self.query:
                super()._post_request(bucket, key)
                return
            names = re.findall(r"<Key>(.*?)</Key>", self._read_body().decode())
            for name in names:
                self._object_path(bucket, name).unlink(missing_ok=True)
            deleted = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
            self._send_xml(ElementTree.fromstring(f"<DeleteResult>{deleted}</DeleteResult>"))

    (tmp_path / "served" / "bucket").mkdir(parents=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    for name, value in {
        "AWS_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": SECRET,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    yield tmp_path / "served" / "bucket"
    server.shutdown()
    server.server_close()
    thread.join()


@dataclass(frozen=True)
class Somewhere:
    """A library's place, and its files."""

    place: str
    files: Path

    def open(self) -> Library:
        return open_library(self.place)


@pytest.fixture(params=["folder", "s3"])
def somewhere(request: pytest.FixtureRequest, tmp_path: Path, begun: Path) -> Somewhere:
    if request.param == "folder":
        found = Somewhere(str(tmp_path / "library"), tmp_path / "library")
    else:
        found = Somewhere("s3://bucket/some/library", request.getfixturevalue("s3") / "some" / "library")
    found.files.mkdir(parents=True)
    shutil.copy(begun / "library.safetensors", found.files)
    return found


def test_what_is_written_can_be_read(somewhere: Somewhere) -> None:
    storage = storage_at(somewhere.place)
    assert storage.write("a/b/c", b"1") and storage.read("a/b/c", 1) == b"1"
    assert not storage.write("a/b/c", b"2", new=True) and storage.read("a/b/c", 1) == b"1"
    first = storage.listed("a")
    assert storage.write("a/b/c", b"22") and set(first) == {"a/b/c"}
    assert storage.listed("a").keys() == first.keys() and storage.listed("a") != first
    with pytest.raises(StorageError, match=r"c: .*2 bytes|larger than the 1 bytes"):
        storage.read("a/b/c", 1)
    storage.remove("a/b/c")
    storage.remove("a/b/c")
    assert storage.read("a/b/c", 9) is None and storage.listed("a") == {}


def test_an_entry_comes_back(somewhere: Somewhere, base: Base, tmp_path: Path) -> None:
    library = somewhere.open()
    card, contents = given(base, library.yardstick, tmp_path, "ada", who="Ada", licence="MIT")
    assert add_entry(library, card, contents) == "added"
    assert add_entry(library, card, contents) == "unchanged"
    (seen,) = somewhere.open().cards()
    assert (seen, seen.rank, seen.parameters) == (card, 2, 128)
    specification = somewhere.open().specifications()["ada"]
    assert specification.to_bytes() == contents["specification.safetensors"]
    fetch_entry(library, "ada", tmp_path / "got")
    assert {p.name: p.read_bytes() for p in (tmp_path / "got").iterdir()} == contents
    ours, theirs = adapter_of(library, "ada").modules[PATH], load_adapter(tmp_path / "ada-0").modules[PATH]
    assert torch.equal(ours.delta(), theirs.delta())
    with pytest.raises(StorageError, match="something here already"):
        fetch_entry(library, "ada", tmp_path / "got")


def test_other_content_takes_its_place_only_if_wanted(somewhere: Somewhere, base: Base, tmp_path: Path) -> None:
    library = somewhere.open()
    old, new = (given(base, library.yardstick, tmp_path, "ada", seed) for seed in (0, 1))
    add_entry(library, *old)
    with pytest.raises(StorageError, match="another entry ada") as caught:
        add_entry(library, *new)
    assert "--replace" in caught.value.hint and somewhere.open().cards() == [old[0]]
    assert add_entry(library, *new, replace=True) == "replaced"
    assert somewhere.open().cards() == [new[0]] and known_card(library, "ada") == new[0]
    files = {p.relative_to(somewhere.files / "entries/ada").as_posix() for p in somewhere.files.rglob("*/ada/**/*.*")}
    home = new[0].home.rpartition("/")[2]
    assert files == {"card.json", *(f"{home}/{name}" for name in new[1])}
    remove_entry(library, "ada")
    assert somewhere.open().cards() == [] and not list(somewhere.files.rglob("*.json"))
    with pytest.raises(StorageError, match="no entry ada"):
        remove_entry(library, "ada")


def test_noise_is_not_drawn_twice(somewhere: Somewhere, base: Base, tmp_path: Path) -> None:
    library = somewhere.open()
    first, again = (given(base, library.yardstick, tmp_path / str(s), "ada", noise=0.1) for s in range(2))
    points = torch.ones(1, len(library.yardstick.directions))
    other = Specification(points, torch.ones(1), library.yardstick.content_hash, 0.1)
    again = card_of("ada", tmp_path / "1" / "ada-0", base, other)
    assert first[0].home != again[0].home
    assert (add_entry(library, *first), add_entry(library, *again)) == ("added", "unchanged")
    assert known_card(library, "ada") == first[0]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda home, card: (home / "specification.safetensors").write_bytes(b"x"), "not what its card says"),
        (lambda home, card: (home / "specification.safetensors").unlink(), "missing"),
        (lambda home, card: card.write_text("{}"), "not an entry's card"),
        (lambda home, card: card.write_text(card.read_text().replace('"ada"', '"eve"')), "the card of eve"),
        (lambda home, card: card.write_text(card.read_text().replace("potluck", "../potluck")), "not an entry's card"),
        (lambda home, card: card.write_text(re.sub(r'base_hash": "\w+', 'base_hash": "' + "0" * 64, card.read_text())),
         "another base"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_left_out(
    somewhere: Somewhere, base: Base, tmp_path: Path, spoil: Callable[[Path, Path], object], says: str
) -> None:
    library = somewhere.open()
    for name in ("ada", "bob"):
        folder = adapter_folder(tmp_path / name, base=base)
        points = torch.ones(1, len(library.yardstick.directions))
        specification = Specification(points, torch.ones(1), library.yardstick.content_hash)
        add_entry(library, *card_of(name, folder, base, specification))
    card = somewhere.files / "entries/ada/card.json"
    spoil(somewhere.files / known_card(library, "ada").home, card)
    (somewhere.files / "registry.sqlite").unlink(missing_ok=True)
    again = somewhere.open()
    assert [card.name for card in again.cards()] == ["bob"]
    assert re.search(says, again.damaged["ada"])
    points = torch.ones(1, len(library.yardstick.directions))
    anew = card_of("ada", tmp_path / "ada", base, Specification(points, torch.ones(1), library.yardstick.content_hash))
    with pytest.raises(ModelError, match=says) as caught:
        add_entry(again, *anew)
    assert "--replace" in caught.value.hint and add_entry(again, *anew, replace=True) == "replaced"
    assert [card.name for card in somewhere.open().cards()] == ["ada", "bob"] and again.damaged == {}
    spoil(somewhere.files / anew[0].home, card)
    remove_entry(somewhere.open(), "ada")
    assert not (somewhere.files / "entries/ada").exists() or not list((somewhere.files / "entries/ada").rglob("*.*"))


def test_damaged_weights_are_found_when_fetched(somewhere: Somewhere, base: Base, tmp_path: Path) -> None:
    library = somewhere.open()
    card, contents = given(base, library.yardstick, tmp_path, "ada")
    add_entry(library, card, contents)
    path = somewhere.files / card.home / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ModelError, match=r"adapter_model.safetensors: not what its card says"):
        fetch_entry(library, "ada", tmp_path / "got")
    assert not list(tmp_path.glob("*got*"))


def test_without_its_card_an_entry_is_not_there(somewhere: Somewhere, base: Base, tmp_path: Path) -> None:
    library = somewhere.open()
    card, contents = given(base, library.yardstick, tmp_path, "ada")
    for name, content in contents.items():
        library.storage.write(f"{card.home}/{name}", content)
    assert somewhere.open().cards() == [] and somewhere.open().damaged == {}
    assert add_entry(library, card, contents) == "added"


def test_the_registry_is_mended(somewhere: Somewhere, base: Base, tmp_path: Path) -> None:
    library = somewhere.open()
    for name in ("ada", "bob"):
        add_entry(library, *given(base, library.yardstick, tmp_path, name))
    shutil.rmtree(somewhere.files / "entries" / "bob")
    (somewhere.files / "registry.sqlite").unlink(missing_ok=True)
    assert [card.name for card in somewhere.open().cards()] == ["ada"]
    library.refresh()
    assert [card.name for card in library.cards()] == ["ada"]


# --- several at once, and killed -----------------------------------------------------------------


def in_children(count: int, work: Callable[[int], object]) -> list[int]:
    """What ``work`` ended with in forked processes: 0, or 8 for a StorageError."""
    pids = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work(number)
                code = 0
            except StorageError:
                code = 8
            finally:
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def test_of_several_with_one_name_one_is_there(begun: Path, base: Base, tmp_path: Path) -> None:
    place = shutil.copytree(begun, tmp_path / "library")
    library = open_library(str(place))
    offers = [given(base, library.yardstick, tmp_path, "ada", seed) for seed in range(4)]
    library.close()
    codes = in_children(4, lambda number: add_entry(open_library(str(place)), *offers[number]))
    assert sorted(codes) == [0, 8, 8, 8]
    library = open_library(str(place))
    (card,) = library.cards()
    assert card == offers[codes.index(0)][0] and adapter_of(library, "ada").rank == 2
    assert len(list((place / "entries" / "ada").iterdir())) == 2


def test_several_add_at_once(begun: Path, base: Base, tmp_path: Path) -> None:
    place = shutil.copytree(begun, tmp_path / "library")
    offers = [given(base, open_library(str(place)).yardstick, tmp_path, f"p{n}", n) for n in range(4)]
    assert in_children(4, lambda number: add_entry(open_library(str(place)), *offers[number])) == [0] * 4
    library = open_library(str(place))
    assert [card.name for card in library.cards()] == ["p0", "p1", "p2", "p3"] and library.damaged == {}


@pytest.mark.parametrize("writes", range(5))
def test_killed_anywhere_the_library_is_whole(begun: Path, base: Base, tmp_path: Path, writes: int) -> None:
    """Killed after so many files of a replacement: the old entry is there in full, or the new one."""
    place = shutil.copytree(begun, tmp_path / "library")
    library = open_library(str(place))
    old, new = (given(base, library.yardstick, tmp_path, "ada", seed) for seed in (0, 1))
    add_entry(library, *old)

    def killed(number: int) -> None:
        mine = open_library(str(place))
        write, left = mine.storage.write, iter(range(writes))

        def counted(*words: Any, **more: Any) -> bool:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*words, **more)

        mine.storage.write = counted  # type: ignore[method-assign]
        add_entry(mine, *new, replace=True)

    assert in_children(1, killed) == [-signal.SIGKILL if writes < 4 else 0]
    again = open_library(str(place))
    assert again.cards() == [old[0] if writes < 4 else new[0]] and again.damaged == {}
    assert adapter_of(again, "ada").rank == 2
    assert add_entry(again, *new, replace=True) == "replaced" and again.cards() == [new[0]]


# --- what is refused -----------------------------------------------------------------------------


def test_what_does_not_fit_is_not_offered(base: Base, begun: Path, tmp_path: Path) -> None:
    yardstick = open_library(str(begun)).yardstick
    specification = Specification(torch.zeros(1, 32), torch.ones(1), yardstick.content_hash)
    folder = adapter_folder(tmp_path / "ada", base=base)
    for name in ("", "a/b", "..", "x" * 65):
        with pytest.raises(RecipeError, match=f"name '{re.escape(name)}'"):
            card_of(name, folder, base, specification)
    with pytest.raises(RecipeError, match="who "):
        card_of("ada", folder, base, specification, who="\x1b[2J")
    (folder / "potluck.json").write_text(json.dumps({"base_hash": "f" * 64}))
    with pytest.raises(ModelError, match="trained on another base"):
        card_of("ada", folder, base, specification)
    save_adapter(Adapter({PATH: Factors(torch.ones(2, 8), torch.ones(8, 2))}), tmp_path / "small")
    with pytest.raises(ModelError, match="8 to 8, the base 32 to 32"):
        card_of("ada", tmp_path / "small", base, specification)


def test_what_is_no_library(tmp_path: Path, s3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (str(tmp_path), str(tmp_path / "gone"), "s3://bucket/empty"):
        with pytest.raises(StorageError, match="no library"):
            open_library(place)
    (tmp_path / "library.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"library.safetensors: cannot be read"):
        open_library(str(tmp_path))
    with pytest.raises(StorageError, match="no such bucket"):
        storage_at("s3://other").write("x", b"")
    with pytest.raises(StorageError, match="cannot be used as a store"):
        open_library("nowhere://bucket")
    with pytest.raises(RecipeError, match="holds credentials") as caught:
        open_library(f"s3://me:{SECRET}@bucket")
    assert SECRET not in str(caught.value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StorageError, match="no credentials in the environment"):
        open_library("s3://bucket")
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(MissingExtra):
        open_library("s3://bucket")


# --- the verbs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stocked(begun: Path, base_folder: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with an adapter of each of three participants, in a folder with what the verbs need."""
    from potluck.compose.library.commands import Offer, Place, add

    folder = tmp_path_factory.mktemp("stocked")
    shutil.copytree(begun, folder / "library")
    for seed, name in enumerate(("ada", "bob", "eve")):
        mine = adapter_folder(folder / "adapters" / name, seed, rank=seed + 1)
        add(Place(str(folder / "library")), Offer(mine, base_folder, texts / name, who=name), lambda _: None)
    return folder


@pytest.fixture
def at(stocked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stocked, tmp_path / "at"))


def test_add_says_what_it_did(potluck: Potluck, at: Path, base_folder: Path, texts: Path) -> None:
    words = ("library", "add", at / "library", at / "adapters/ada", "--base", base_folder, "--data", texts / "ada")
    assert potluck(*words, "--who", "ada", "--json").result["outcome"] == "unchanged"
    done = potluck(*words, "--name", "ada.2", "--noise", "0.1", "--spec-points", "7", "--json").result
    assert (done["outcome"], done["points"], done["noise"], done["rank"]) == ("added", 7, 0.1, 1)
    assert done["specification_bytes"] <= 30_000 and done["windows"] > 7
    assert "another entry ada" in potluck(*words, "--who", "somebody", code=8).err
    assert "outcome: replaced" in potluck(*words, "--who", "somebody", "--replace").out


def test_an_adapter_without_effect_is_said_to_be_one(
    potluck: Potluck, at: Path, base_folder: Path, texts: Path
) -> None:
    """When it is added and when others are grouped; the entry says what it gains."""
    nothing = {PATH: Factors(torch.ones(1, 32), torch.zeros(32, 1))}
    save_adapter(Adapter(nothing, base="hub/other"), at / "idle")
    words = ("library", "add", at / "library", at / "idle", "--base", base_folder, "--data", texts / "ada")
    done = potluck(*words, "--json")
    doubted = ("hub/other, and this base is", "all its products are zero", "has no effect")
    assert (
        [word for word in doubted if word not in done.err]
        == []
        == [word for word in doubted if not any(word in warning for warning in done.result["warnings"])]
    )
    assert "reading the text" in done.err  # progress
    cards = potluck("library", "list", at / "library", "--json").result["entries"]
    assert {card["name"]: card["gain"] for card in cards}["idle"] == 0
    grouped = potluck("library", "cluster", at / "library", "--k", "3", "--json")
    assert "idle: left out" in grouped.err and len(grouped.result["clusters"]) == 3


def test_a_library_is_begun_once(base: Base, tmp_path: Path) -> None:
    said: list[str] = []
    open_library(str(tmp_path / "new"), begun_with=base, say=said.append).close()
    assert "the base writes text of its own" in said[0] and not (tmp_path / "new/begun").is_dir()
    open_library(str(tmp_path / "new"), begun_with=base, say=said.append).close()
    assert len(said) == 4


def test_search_finds_whose_text_it_is(potluck: Potluck, at: Path, base_folder: Path, texts: Path) -> None:
    for name in ("ada", "eve"):
        words = ("library", "search", at / "library", "--base", base_folder, "--data", texts / name)
        found = potluck(*words, "--json").result
        assert (found["matches"][0]["name"], found["matches"][0]["who"], found["fit"]) == (name, name, "alike")
        mixed = potluck(*words, "--mixture", "--json").result
        assert mixed["matches"][0]["name"] == name and mixed["matches"][0]["share"] > 0.9
    assert "eve" in potluck(*words, "--top", 1).out


def test_a_text_of_another_kind_is_said_to_fit_nobody(
    potluck: Potluck, at: Path, base_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "digits.txt").write_text(" ".join(str(number**3) for number in range(2000)))
    words = ("library", "search", at / "library", "--base", base_folder, "--data", "digits.txt")
    assert potluck(*words, "--json").result["fit"] == "unlike"
    assert "warning: no entry fits" in potluck(*words).err


def test_list_get_and_remove(potluck: Potluck, at: Path) -> None:
    found = potluck("library", "list", at / "library", "--json").result
    assert [(entry["name"], entry["rank"]) for entry in found["entries"]] == [("ada", 1), ("bob", 2), ("eve", 3)]
    assert "bob" in potluck("library", "list", at / "library").out
    assert potluck("library", "get", at / "library", "bob", "--out", "got", "--json").result["rank"] == 2
    assert load_adapter(at.parent / "got").rank == 2
    assert potluck("library", "remove", at / "library", "bob", "--json").result["outcome"] == "removed"
    assert "no entry bob" in potluck("library", "get", at / "library", "bob", "--out", "again", code=8).err
    assert len(potluck("library", "list", at / "library", "--json").result["entries"]) == 2


def test_cluster_and_merge(potluck: Potluck, at: Path) -> None:
    found = potluck("library", "cluster", at / "library", "--k", 2, "--json").result
    assert sorted(name for names in found["clusters"].values() for name in names) == ["ada", "bob", "eve"]
    words = ("library", "cluster", at / "library", "--k", 1, "--merge", "svd", "--out", "merged")
    assert "ada, bob, eve" in potluck(*words, "--rank", 2).out
    assert load_adapter(at.parent / "merged" / "cluster-0").rank == 2
    assert "something here already" in potluck(*words, code=8).err
    for wrong, says in (
        (["--k", 4], "4 groups of 3"), (["--k", 1, "--rank", 2], "--rank has no effect"),
        (["--k", 1, "--merge", "svd"], "--merge and --out go together"),
        (["--k", 1, "--merge", "magic", "--out", "x"], "no method magic"),
    ):  # fmt: skip
        assert says in potluck("library", "cluster", at / "library", *wrong, code=3).err
    assert not list(at.parent.glob("*x"))


def test_route_measures_both(potluck: Potluck, at: Path, base_folder: Path, texts: Path) -> None:
    words = ("library", "route", at / "library", "--base", base_folder, "--data", texts / "ada")
    arrow = (*words, "--by", "arrow")
    found = potluck(*arrow, "--top-k", 2, "--json").result
    assert sum(found["shares"].values()) == pytest.approx(1) and set(found["shares"]) == {"ada", "bob", "eve"}
    assert found["base_nats"] > 0 and found["routed_nats"] != found["base_nats"]
    assert potluck(*arrow, "--nearest", 1, "--json").result["shares"] == {"ada": 1.0}
    assert "top_k = 4 of 3" in potluck(*arrow, "--top-k", 4, code=3).err
    assert "share" in potluck(*arrow).out
    assert "has no profile" in potluck(*words, code=5).err
    assert "--temperature has no effect" in potluck(*words, "--temperature", 2, code=3).err


def test_profiles_are_given_away_only_if_asked_and_route_by_evidence(
    potluck: Potluck, at: Path, base_folder: Path, texts: Path
) -> None:
    for name in ("ada", "bob", "eve"):
        words = ("library", "add", at / "library", at / "adapters" / name, "--base", base_folder, "--replace")
        done = potluck(*words, "--data", texts / name, "--public", texts, "--json").result
        assert (done["outcome"], done["profile_bytes"] > 600) == ("replaced", True)
    words = ("library", "route", at / "library", "--base", base_folder, "--data", texts / "bob")
    found = potluck(*words, "--json").result
    assert next(iter(found["shares"])) == "bob" and found["shares"]["bob"] > 0.5
    assert sum(found["shares"].values()) < 1  # what is missing is the base's
    assert "top_k = 4 of 3" in potluck(*words, "--top-k", 4, code=3).err


def test_a_registry_elsewhere(potluck: Potluck, at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_REGISTRY", f"sqlite:///{at}/other.sqlite")
    assert len(potluck("library", "list", at / "library", "--json").result["entries"]) == 3
    assert (at / "other.sqlite").exists()
    wrong = ("--registry", f"mysql://me:{SECRET}@host/x")
    ended = potluck("library", "list", at / "library", *wrong, "--json", code=3)
    assert SECRET not in ended.out + ended.err


def test_an_empty_library_and_another_base(
    potluck: Potluck, at: Path, begun: Path, base_folder: Path, texts: Path, tmp_path: Path
) -> None:
    data = ("--data", texts / "ada")
    assert "no entries" in potluck("library", "search", begun, "--base", base_folder, *data, code=8).err
    other = Path(shutil.copytree(base_folder, tmp_path / "other"))
    model = LlamaForCausalLM.from_pretrained(other)
    model.lm_head.weight.data += 1
    model.save_pretrained(other)
    assert (
        "not the base of this library"
        in potluck("library", "search", at / "library", "--base", other, *data, code=5).err
    )
