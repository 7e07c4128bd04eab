"""GRACE and WISE on the world: what they answer, however they are asked, and what is left when an edit goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from potluck.compose.base import Base, load_base
from potluck.edit.evaluation import answered, answers_before, right_answers, score_edits
from potluck.edit.facts import Edit, write_edits
from potluck.edit.grace import GraceMemory, edit_with_grace, grace_memory
from potluck.edit.grace import without as without_in_codebook
from potluck.edit.memory_folder import load_memory
from potluck.edit.prompts import answers, logits_of, row, rows_of
from potluck.edit.requests import Request, apply, revert
from potluck.edit.side_memory import SideMemory, attached, continued, save_with_memory
from potluck.edit.wise import WiseMemory, WiseSettings, _near, edit_with_wise, wise_memory
from potluck.edit.wise import without as without_in_shards
from potluck.edit.world_edits import changed_world
from potluck.errors import EditError
from potluck.models.memory import Shards

WORLD = Path(__file__).parents[1] / "assets" / "world"


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(WORLD)


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    return changed_world(8, 0)


@pytest.fixture(scope="module")
def book(base: Base, edits: list[Edit]) -> GraceMemory:
    return edit_with_grace(base, edit_with_grace(base, grace_memory(base, 4), edits[:5]), edits[5:])


@pytest.fixture(scope="module")
def side(base: Base, edits: list[Edit]) -> WiseMemory:
    settings = WiseSettings(shard=4, quiet=10)
    return edit_with_wise(base, edit_with_wise(base, wise_memory(base, 4, settings), edits[:3]), edits[3:])


@pytest.fixture(params=["book", "side"])
def memory(request: pytest.FixtureRequest) -> SideMemory:
    found: SideMemory = request.getfixturevalue(request.param)
    return found


def test_edits_hold_and_others_answers_stay(base: Base, edits: list[Edit], memory: SideMemory) -> None:
    before = answers_before(base, edits)
    with attached(base, memory):
        scores = score_edits(base, edits, before)
        assert vars(scores) == pytest.approx(vars(score_edits(base, edits, before, batch_size=1)))
    assert scores.reliability == scores.given_reliability == 1
    assert scores.locality is not None and scores.locality >= 0.8
    assert (scores.rephrase or 0) >= (0.8 if isinstance(memory, WiseMemory) else 0)
    assert all(answered(base, [(edit.prompt, edit.old) for edit in edits]).exactly)  # the model is as it was


def test_one_text_whole_in_a_batch_or_token_by_token(base: Base, edits: list[Edit], memory: SideMemory) -> None:
    rows = [row(base.vocabulary, edit.prompt, f"{edit.target}.") for edit in edits[:3]]
    with attached(base, memory), torch.inference_mode():
        batch = logits_of(base.model, rows_of(rows, base.vocabulary.end_of_text))
        for i, one in enumerate(rows):
            alone = logits_of(base.model, rows_of([one], 0))[0]
            cache, steps = None, []
            for token in one.ids:
                out = base.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                steps.append(out.logits[0, -1].float())
            assert torch.allclose(batch[i, : len(one.ids)], alone, atol=1e-3)
            assert torch.allclose(torch.stack(steps), alone, atol=1e-3)


def test_a_folder_answers_as_the_memory_does(base: Base, edits: list[Edit], memory: SideMemory, tmp_path: Path) -> None:
    save_with_memory(base, memory, tmp_path / "edited")
    prompts = [edit.prompt for edit in edits] + [prompt for edit in edits for prompt in edit.neighbours]
    with attached(base, memory):
        expected = answers(base, prompts)
    assert answers(load_base(tmp_path / "edited"), prompts) == expected
    reopened, held = load_memory(tmp_path / "edited")
    assert answers(reopened, prompts) == answers(base, prompts)
    with attached(reopened, held):
        assert answers(reopened, prompts) == expected
    done = revert(tmp_path / "edited", ["1"], tmp_path / "less")
    assert done["edits"] == 7
    left = [(edit.prompt, edit.old if edit.id == "1" else edit.target) for edit in edits]
    assert all(answered(load_base(tmp_path / "less"), left).exactly)
    write_edits(tmp_path / "one.json", edits[1:2])
    method, layer = ("grace", 4) if isinstance(held, GraceMemory) else ("wise", 4)
    again = Request(tmp_path / "less", tmp_path / "one.json", tmp_path / "more", method, (layer,))
    assert apply(again)["told"] == 1
    assert all(right_answers(load_base(tmp_path / "more"), edits))
    with pytest.raises(EditError, match="was edited with layers"):
        apply(replace(again, layers=(3,), out=tmp_path / "other"))


def test_what_is_taken_back_leaves_no_trace(base: Base, edits: list[Edit], side: WiseMemory, book: GraceMemory) -> None:
    left = without_in_shards(base, side, ["5"])
    assert torch.equal(left.shards[0].delta, side.shards[0].delta)
    never = edit_with_wise(base, wise_memory(base, 4, side.settings), edits[:4])
    never = edit_with_wise(base, never, [edit for edit in edits[4:] if edit.id != "5"])
    assert all(torch.equal(a.delta, b.delta) for a, b in zip(left.shards, never.shards, strict=True))
    fewer = without_in_codebook(book, ["1", "6"])
    with attached(base, fewer):
        assert all(answered(base, [(e.prompt, e.old if e.id in ("1", "6") else e.target) for e in edits]).exactly)
    for missing in (lambda: without_in_codebook(book, ["9"]), lambda: without_in_shards(base, side, ["9"])):
        with pytest.raises(EditError, match="there is no edit 9"):
            missing()
    with pytest.raises(EditError, match="there is an edit 1 already"):
        edit_with_grace(base, book, edits[1:2])


def test_of_one_name_alone_no_other_can_be_made(edits: list[Edit]) -> None:
    assert _near(edits[:1], 4, 0) == ([], [])


def test_the_shard_that_recognises_most_is_asked_for_as_long_as_its_answer() -> None:
    shards = Shards(2, d_in=2, d_out=1)
    deltas, thresholds = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([1.0, 2.0])
    shards.load_state_dict({"deltas": deltas, "thresholds": thresholds, "spans": torch.tensor([3, 1])})
    x = torch.tensor([[[0.5, 0.0], [1.0, 0.0], [0.3, 0.3], [0.0, 6.0], [0.2, 0.5], [0.4, 0.0], [9.0, 0.0]]])
    whole = shards(x, torch.zeros(1, 7, 1))
    assert whole.flatten().tolist() == pytest.approx([0.0, 1.0, 0.3, 6.0, 0.0, 0.0, 9.0])
    for cut in (1, 2, 4):
        shards.reset()
        parts = [shards(x[:, i : i + cut], torch.zeros(1, min(cut, 7 - i), 1)) for i in range(0, 7, cut)]
        assert torch.equal(torch.cat(parts, 1), whole)


def test_a_side_memory_ends_with_the_answer(base: Base, edits: list[Edit], side: WiseMemory) -> None:
    rows = [row(base.vocabulary, edit.prompt, edit.target) for edit in edits]
    ended = continued(base, rows, 12)
    with attached(base, side):
        assert continued(base, rows, 12) == ended  # as the model without it goes on


def test_plain_transformers_refuses_a_folder_with_a_memory(base: Base, book: GraceMemory, tmp_path: Path) -> None:
    save_with_memory(base, book, tmp_path / "edited")
    config = (tmp_path / "edited" / "config.json").read_text()
    (tmp_path / "edited" / "config.json").write_text(config.replace("potluck_edited", "potluck_edited_elsewhere"))
    with pytest.raises(ValueError, match="potluck_edited_elsewhere"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
