from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from potluck.records.card import model_card
from potluck.records.curves import read_run


def test_card_of_a_run(run_folder: Path) -> None:
    recipe = (run_folder / "recipe.toml").read_text()
    card = model_card(read_run(run_folder), recipe)
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert "\ntags:\n- potluck\n- federated\n---\n" in card
    assert "1.07M parameters, trained by 3 participants" in card
    assert "225k tokens in 4 of 4 rounds" in card
    assert "| sympy | 32 | 150 kB | 60k | 61.4k |" in card
    assert "| pip | 1,000 | 2.000 |" in card
    assert "| **all** | 3,000 | 2.600 |" in card
    assert re.search("`█▆[▄▅]▃▁` from 8.000 to 2.600", card)
    assert f"```toml\n{recipe.strip()}\n```" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "| torch | 2.13.0 |" in card
    assert str(run_folder) not in card
    assert "read in one place" not in card
    assert "read in one place" in model_card(read_run(run_folder), '[tokenizer]\nkind = "bpe"\n')


def test_base_model_and_a_recipe_with_a_fence(run_folder: Path) -> None:
    card = model_card(read_run(run_folder), 'name = "```"', base_model='org/base: "x"')
    assert 'base_model: "org/base: \\"x\\""\n' in card
    assert '````toml\nname = "```"\n````' in card


def test_card_of_a_run_alone_names_its_trainer_only(tmp_path: Path, make_run: Callable[..., None]) -> None:
    make_run(tmp_path / "pip", "alone", ("pip",))
    card = model_card(read_run(tmp_path / "pip"), "")
    assert "trained by one participant" in card
    assert "| pip | 31 |" in card
    assert "| numpy | 30 |" not in card


def test_names_are_data(run_folder: Path) -> None:
    from markdown_it import MarkdownIt

    odd = "_a_ [x](//evil.example) <script> `b` | *c* & ~~d~~ # $e$ a_b !"
    record = replace(read_run(run_folder), environment={"device": odd}, name=odd)
    card = model_card(record, "", base_model=odd)
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(card[card.index("\n---\n") + 5 :])
    shown = html.escape(odd, quote=False)
    assert f"<h1>{shown}</h1>" in page
    assert f'<td>device</td>\n<td style="text-align:right">{shown}</td>' in page
    assert f"started from {shown}." in page
    assert not re.search("<(script|em|code>b|a |s>)", page)
