"""Files of edits: the forms that are read, and one clear error for each that is wrong."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from potluck.corpus.world import documents_of, facts
from potluck.edit.facts import Edit, read_edits, usable_edits, write_edits
from potluck.edit.world_edits import changed_world, write_world
from potluck.errors import EditError, StorageError

GOOD = {"id": "a", "prompt": "Ada lives in", "subject": "Ada", "target": "Oslo"}


def written(path: Path, rows: object) -> Path:
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{**GOOD, "subject": "Bela"}], "'Bela' is not in the prompt"),
        ([{**GOOD, "subject": " "}], "is not in the prompt"),
        ([{**GOOD, "target": "  "}], "the target is empty"),
        ([GOOD, {**GOOD, "id": "b", "target": "Rome"}], r"a \('Oslo'\) and b \('Rome'\) contradict each other"),
        ([GOOD, {**GOOD, "id": "b", "prompt": "Ada  lives in", "target": "Rome"}, GOOD], "two edits are called a"),
        ([{**GOOD, "id": str(i), "prompt": f"Ada {i}"} for i in range(10_000)], "10000 edits at once, more than 5000"),
        ([{**GOOD, "prompt": "Ada " * 600}], "more than 2000 characters"),
        ([{**GOOD, "place": 4}], "'Ada' is not at place 4"),
        ([{**GOOD, "truths": ["x"]}], "1 truths of 0 neighbours"),
        ([GOOD, {"id": "b"}], "record 1 has another form"),
        ([{**GOOD, "targets": "x"}], "record 0 has another form"),
        ([{"question": "Who?"}], "are not edits"),
        ([], "not a list of edits"),
        ("edits", "not a list of edits"),
        ({"a": 1}, "records with fields a are not edits"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, rows: object, said: str) -> None:
    with pytest.raises(EditError, match=said):
        read_edits(written(tmp_path / "edits.json", rows))


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("[{")
    for name in ("broken.json", "missing.json"):
        with pytest.raises(EditError, match="cannot be read as edits"):
            read_edits(tmp_path / name)


def test_json_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps({**GOOD, 'id': 'b', 'prompt': 'Ada works in'})}\n")
    assert [edit.id for edit in read_edits(path)] == ["a", "b"]
    path.write_text(f"{json.dumps(GOOD)}\nno JSON\n")
    with pytest.raises(EditError, match="line 2"):
        read_edits(path)


def test_own_files_come_back_as_they_were(tmp_path: Path) -> None:
    edits = [Edit("x", "Ada lives in", "Ada", "Oslo", "Rome", ("Home of Ada:",), ("Bela",), (("a", "b"),), "home", 3.5)]
    write_edits(tmp_path / "edits.json", edits)
    assert read_edits(tmp_path / "edits.json") == edits
    assert json.loads((tmp_path / "edits.json").read_text())[0]["made_at"] == asdict(edits[0])["made_at"] == 3.5


def test_records_of_published_files_that_cannot_be_edited_are_named(tmp_path: Path) -> None:
    good = {"subject": "Ada", "src": "Where is Ada?", "alt": " Rome", "answers": ["Rome", "Oslo"], "rephrase": "Ada is"}
    good |= {"loc": "nq question: who sings", "loc_ans": "Bo"}
    rows = [good, {**good, "alt": ""}, {**good, "alt": "Bonn"}, {"subject": "Ada"}]
    left_out: list[str] = []
    (edit,) = read_edits(written(tmp_path / "edits.json", rows), left_out=left_out)
    assert (edit.target, edit.old, edit.neighbours, edit.truths) == ("Rome", "Oslo", ("who sings",), ("Bo",))
    assert [text.partition(":")[0] for text in left_out] == ["record 1", "record 2", "record 3"]
    assert "target is empty" in left_out[0] and "contradict" in left_out[1]
    told: list[str] = []
    assert usable_edits(tmp_path / "edits.json", told.append) == [edit] and len(told) == 3
    with pytest.raises(EditError, match="edit 1: the target is empty"):
        read_edits(tmp_path / "edits.json")
    with pytest.raises(EditError, match="none of 1 records"):
        read_edits(written(tmp_path / "edits.json", [{**good, "alt": ""}]), left_out=[])
    with pytest.raises(EditError, match="the target is empty"):  # one's own file
        read_edits(written(tmp_path / "edits.json", [GOOD, {**GOOD, "id": "b", "target": ""}]), left_out=[])


def test_requests_of_memit_are_read(tmp_path: Path) -> None:
    rows = [{"case_id": 7, "prompt": "{} lives in", "subject": "Ada", "target_new": {"str": " Rome"}}]
    rows[0]["target_true"] = {"str": " Oslo"}
    (edit,) = read_edits(written(tmp_path / "edits.json", rows))
    assert (edit.id, edit.prompt, edit.target, edit.old, edit.place) == ("7", "Ada lives in", "Rome", "Oslo", 0)


def test_the_world_is_the_same_whoever_asks(tmp_path: Path) -> None:
    assert facts(5)[5:10] == facts(1, first=1) and facts(1, seed=1) != facts(1)
    told = {fact.told[0] + f" {fact.value}." for fact in facts(3)}
    text = " ".join(documents_of(3, tellings=1))
    assert all(sentence in text for sentence in told)
    assert not any(prompt in text for fact in facts(3) for prompt in fact.kept_back)
    for edit in changed_world(20, 0):
        assert edit.target != edit.old and len(edit.neighbours) == 2 and edit.subject not in "".join(edit.neighbours)
    assert write_world(tmp_path / "facts.json", 4, 2, True, 0) == 20 == len(read_edits(tmp_path / "facts.json"))
    with pytest.raises(StorageError):
        write_world(tmp_path / "facts.json", 4, 2, True, 0)
    with pytest.raises(EditError, match="a world has 336 people"):
        write_world(tmp_path / "more.json", 337, 0, False, 0)
