"""Each document has one holder, and one side."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from potluck.corpus.holdings import held_documents, kept_documents, text_keys
from potluck.errors import CorpusError
from potluck.recipe import Recipe, parse_recipe


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"text {i} " * (1 + i % 7), "group": f"g{i % 13}"} for i in range(600)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def split(jsonl: Path, how: str, participants: int = 4, data: dict[str, Any] | None = None, **keys: Any) -> Recipe:
    source = {"jsonl": str(jsonl), "group_field": "group"}
    divided = {"participants": participants, "how": how, **keys}
    return parse_recipe({"data": {"source": source, "split": divided, **(data or {})}})


@pytest.mark.parametrize(
    "kind", [{"how": "iid"}, {"how": "contiguous"}, {"how": "groups"}, {"how": "dirichlet", "alpha": 0.5}]
)
def test_every_document_has_exactly_one_holder(jsonl: Path, kind: dict[str, Any]) -> None:
    recipe = split(jsonl, **kind)
    held = [(name, document.name) for name, document in held_documents(recipe)]
    assert [document for _, document in held] == [f"a.jsonl:{i + 1}" for i in range(600)]
    assert {name for name, _ in held} == set(recipe.participant_names)
    assert held == [(name, document.name) for name, document in held_documents(recipe)]


def test_shape_of_the_splits(jsonl: Path) -> None:
    def sizes(recipe: Recipe) -> list[int]:
        counted: Counter[str] = Counter()
        for name, document in held_documents(recipe):
            counted[name] += len(document.text)
        return [counted[name] for name in recipe.participant_names]

    for how in ("contiguous", "iid"):
        assert max(sizes(split(jsonl, how))) < 1.3 * min(sizes(split(jsonl, how)))
    in_order = [name for name, _ in held_documents(split(jsonl, "contiguous"))]
    assert in_order == sorted(in_order)
    owners = defaultdict(set)
    for name, document in held_documents(split(jsonl, "groups")):
        owners[document.group].add(name)
    assert len(owners) == 13 and all(len(names) == 1 for names in owners.values())
    uneven, even = sizes(split(jsonl, "dirichlet", alpha=0.05)), sizes(split(jsonl, "dirichlet", alpha=1000.0))
    assert max(even) < 1.3 * min(even) and max(uneven) > 2 * min(uneven)
    assert sizes(split(jsonl, "iid")) != sizes(split(jsonl, "iid").model_copy(update={"seed": 1}))


def test_too_few_groups(jsonl: Path) -> None:
    with pytest.raises(CorpusError, match="13 groups cannot be divided among 14"):
        list(held_documents(split(jsonl, "groups", 14)))


def test_the_same_text_is_on_the_same_side_everywhere(tmp_path: Path) -> None:
    for name, order in {"a": 1, "b": -1}.items():
        (tmp_path / name).mkdir()
        for i in range(200):
            (tmp_path / name / f"{order * i + 300}.txt").write_text(f"shared text {i}")
    recipe = parse_recipe({"participants": [{"name": name, "source": {"path": str(tmp_path / name)}} for name in "ab"]})
    sides = defaultdict(set)
    for kept in kept_documents(recipe):
        sides[kept.document.text].add(kept.side)
    assert len(sides) == 200 and all(len(side) == 1 for side in sides.values())
    assert 5 < sum(side == {"validation"} for side in sides.values()) < 40


def test_caps_bound_each_side_and_end_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": f"{i:05d}" * 2}) for i in range(2000)]
    path.write_text("\n".join([*good, "not JSON: reading ends before this line"]))
    capped = {"train_bytes": 1004, "validation_bytes": 300, "validation_fraction": 0.3}
    recipe = parse_recipe({"data": capped, "participants": [{"name": "a", "source": {"jsonl": str(path)}}]})
    sizes: Counter[str] = Counter()
    for kept in kept_documents(recipe):
        sizes[kept.side] += kept.size
    assert sizes == {"train": 1000, "validation": 300}


def test_text_keys_follow_content_and_rule_but_not_place(tmp_path: Path, jsonl: Path) -> None:
    keys = text_keys(split(jsonl, "iid"))
    assert len(set(keys.values())) == 4
    (tmp_path / "moved").mkdir()
    moved = jsonl.rename(tmp_path / "moved" / jsonl.name)
    assert text_keys(split(moved, "iid")) == keys
    assert text_keys(split(moved, "iid", data={"train_bytes": 10**6})) != keys
    moved.write_text(moved.read_text().replace("text 5 ", "text V ", 1))
    assert not set(text_keys(split(moved, "iid")).values()) & set(keys.values())
