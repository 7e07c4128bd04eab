"""Edited folders: what plain `transformers` loads, and what can be taken back later, in another process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from potluck.compose.base import load_base
from potluck.corpus.world import documents_of, facts
from potluck.edit.consequences import consequences, parted, watch
from potluck.edit.edited_folder import load_edited
from potluck.edit.facts import Edit, write_edits
from potluck.edit.requests import Request, apply, revert
from potluck.edit.tuning import Tuning, fine_tune
from potluck.edit.world_edits import changed_world
from potluck.errors import EditError, RecipeError, StorageError

WORLD = Path(__file__).parents[1] / "assets" / "world"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with edits, a text, and a model that two of them were made in."""
    folder = tmp_path_factory.mktemp("edited")
    known = facts(200)[:40:5]
    edits = [
        Edit(str(i), fact.told[0], fact.person, next(v for v in fact.relation.values if v != fact.value))
        for i, fact in enumerate(known)
    ]
    write_edits(folder / "edits.json", edits[:2])
    write_edits(folder / "more.json", edits[2:3])
    (folder / "text.txt").write_text("\n".join(documents_of(40, tellings=1)))
    apply(request(folder, folder / "edited"), folder / "moments")
    return folder


def request(folder: Path, out: Path, **changes: object) -> Request:
    given = {"model": WORLD, "edits": folder / "edits.json", "method": "memit", "text": folder / "text.txt", **changes}
    return Request(out=out, **given)  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())


def test_edits_are_in_plain_weights_and_come_out_again(place: Path) -> None:
    old, new = weights(WORLD), weights(place / "edited")
    assert {name.split(".mlp.")[-1] for name in old if not torch.equal(old[name], new[name])} == {"down_proj.weight"}
    assert revert(place / "edited", ["0", "1"], place / "clean")["edits"] == 0
    assert all(torch.equal(old[name], tensor) for name, tensor in weights(place / "clean").items())


def test_a_loaded_editor_goes_on(place: Path) -> None:
    more = request(place, place / "further", model=place / "edited", edits=place / "more.json", text=None)
    apply(more)
    assert [edit.id for edit in load_edited(place / "further").edits] == ["0", "1", "2"]
    revert(place / "further", ["2"], place / "back")
    old, back = weights(place / "edited"), weights(place / "back")
    assert all(torch.allclose(old[name], back[name], atol=1e-6) for name in old)


def test_what_was_changed_since_is_not_taken_back(place: Path, tmp_path: Path) -> None:
    revert(place / "edited", ["0"], tmp_path / "one")
    base = load_base(tmp_path / "one")
    with torch.no_grad():
        next(base.model.parameters()).mul_(1.01)
    base.model.save_pretrained(tmp_path / "one")
    with pytest.raises(EditError, match="changed since"):
        load_edited(tmp_path / "one")
    path = tmp_path / "one" / "edits" / "edits.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "batches": [[{"id": "0"}]]}))
    with pytest.raises(EditError, match="not known which edits"):
        load_edited(tmp_path / "one")


def test_edits_without_effect_are_warned_of_and_not_written_where_that_is_strict(place: Path, tmp_path: Path) -> None:
    report = json.loads((place / "edited" / "edit-report.json").read_text())  # this model keeps nothing at subjects
    assert report["told"] == 0 and report["loss"] > 0 and report["fluency_before"] > 0
    assert "no effect" in report["warnings"][0]
    with pytest.raises(EditError, match="no effect"):
        apply(request(place, tmp_path / "strict", strict=True), place / "moments")
    assert not (tmp_path / "strict").exists()
    told = apply(request(place, tmp_path / "told", method="grace", strict=True))
    assert told["told"] == 1 and "warnings" not in told


def test_harm_is_warned_of() -> None:
    base, edits = load_base(WORLD), changed_world(2, 0)
    left, held = parted(["One text. " * 50, "Another. " * 50])
    assert len("".join(held)) == 95 and "".join(left) + "".join(held) == "One text. " * 50 + "Another. " * 50
    watched = watch(base, edits, list(documents_of(4)))
    assert "warnings" not in consequences(base, watch(base, [replace(e, target=e.old) for e in edits]))
    fine_tune(base, edits, Tuning((3, 4), steps=8, learning_rate=2e-2, enough=0.0))
    said = " ".join(consequences(base, watched)["warnings"])
    assert "answers about others changed" in said and "loss rose" in said


def test_options_without_effect_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs --text"):
        apply(request(place, tmp_path / "new", text=None))
    with pytest.raises(RecipeError, match="--at has no effect on ft"):
        apply(request(place, tmp_path / "new", method="ft", at="prompt"))
    with pytest.raises(StorageError, match="something here already"):
        apply(request(place, place / "edited"))
    with pytest.raises(EditError, match="was edited with method memit"):
        apply(request(place, tmp_path / "new", model=place / "edited", edits=place / "more.json", method="rome"))
    assert not (tmp_path / "new").exists()
