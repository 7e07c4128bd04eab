"""A participant's own part: what its file says, and what the command line puts over it."""

from __future__ import annotations

from pathlib import Path

import pytest

from potluck.errors import RecipeError
from potluck.recipe.part import load_part


def part_file(folder: Path, text: str) -> Path:
    path = folder / "part.toml"
    path.write_text(text)
    return path


def test_the_file_is_extended_and_not_replaced(tmp_path: Path) -> None:
    path = part_file(tmp_path, 'source = { path = "texts" }\n[policy]\nkinds = ["train"]\nmax_bytes = 7\n')
    part = load_part(path, {"device": "cpu"}, {"max_local_steps": 3}, ["words"])
    assert part.policy.kinds == ("train", "words")
    assert (part.policy.max_bytes, part.policy.max_local_steps, part.device) == (7, 3, "cpu")
    assert part.source.path == str(tmp_path / "texts")


def test_words_are_not_given_away_unasked() -> None:
    assert "words" not in load_part(None, {"source": {"path": "x"}}, {}, ()).policy.kinds


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "source: must be given"),
        ('source = { path = "x" }\nsourse = 1', "sourse: unknown key; did you mean 'source'"),
        ('source = { path = "x" }\npolicy = 3', "policy: "),
        ('source = { path = "x" }\n[policy]\nkinds = ["steal"]', "'steal' is not one of"),
        ("= 3", "cannot be read"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=r"part\.toml") as error:
        load_part(part_file(tmp_path, text), {}, {}, ())
    assert says in str(error.value)
