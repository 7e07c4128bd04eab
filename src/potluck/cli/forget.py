"""The verb ``forget``: make a model forget, take out a participant, check a record of it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from potluck.cli.edit import Site
from potluck.cli.options import JsonOption
from potluck.terminal import progress, results, table, warn, write_json

verbs = typer.Typer()


class Method(StrEnum):
    """How a model forgets."""

    stranger = "stranger"
    rome = "rome"
    memit = "memit"
    alphaedit = "alphaedit"
    wise = "wise"
    ft = "ft"
    lora = "lora"
    as_stranger = "as-stranger"
    ga = "ga"
    grad_diff = "grad-diff"
    kl = "kl"
    npo = "npo"
    simnpo = "simnpo"
    idk_dpo = "idk-dpo"
    rmu = "rmu"


def _panel(title: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=title, **more)


_EDITORS, _LOSSES, _PARTICIPANT, _RECORD = "Editors", "Losses", "A participant's whole part", "A signed record"


@verbs.command()
def forget(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", help="A model folder; it stays as it is.")] = None,
    forget: Annotated[Path | None, typer.Option("--forget", help="Questions to forget: JSON lines, or edits.")] = None,
    retain: Annotated[Path | None, typer.Option(help="Questions whose answers shall stay.")] = None,
    method: Annotated[Method, typer.Option(help="Editors up to `lora`, then losses.")] = Method.grad_diff,
    out: Annotated[Path | None, typer.Option(help="The folder to write, a new one.")] = None,
    task: Annotated[str, typer.Option(help="Of TOFU's files, forget this task's questions alone.")] = "",
    refusals: Annotated[Path | None, typer.Option(help="What to answer instead, one a line.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text that shall stay as it is; its loss is measured.")] = None,
    layers: Annotated[str, _panel(_EDITORS, "Whose maps are written, such as `1,2`.")] = "",
    at: Annotated[Site | None, _panel(_EDITORS, "At whose last token; the subject's if left out.")] = None,
    merge: Annotated[int, _panel(_EDITORS, "Join so many questions about one subject.", min=1)] = 1,
    refuse: Annotated[bool, _panel(_EDITORS, "After `stranger`, edit refusals in.", "--refuse", metavar="")] = False,
    epochs: Annotated[
        int | None, _panel(_LOSSES, "Passes over what is to be forgotten; until it is, at most 10.", min=1)
    ] = None,
    batch_size: Annotated[int | None, _panel(_LOSSES, "Questions of each kind in a step; 8.", min=1)] = None,
    learning_rate: Annotated[
        float | None, _panel(_LOSSES, "Peak of AdamW; fits the model if left out.", min=1e-9)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    expert: Annotated[str, _panel(_PARTICIPANT, "Write the mixture MODEL without this expert.")] = "",
    adapter: Annotated[str, _panel(_PARTICIPANT, "Take this adapter out of the library MODEL.")] = "",
    record: Annotated[Path | None, _panel(_RECORD, "Write one here.")] = None,
    key: Annotated[Path | None, _panel(_RECORD, "The key that signs it, made if there is none.")] = None,
    verify: Annotated[Path | None, _panel(_RECORD, "Check this one, and nothing else.", metavar="RECORD")] = None,
    opening: Annotated[str, _panel(_RECORD, "Of the commitment, with --verify and --forget.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Make a model forget, take out all that a participant gave, or check a record of it."""
    from potluck.edit.forgetting import commands

    if verify is not None:
        _print(commands.verify(verify, model, forget, opening, task), as_json)
        return
    if model is None:
        raise typer.BadParameter("name the model", param_hint="MODEL")
    if opening:
        raise typer.BadParameter("has no effect without --verify", param_hint="--opening")
    if expert or adapter:
        if (expert and adapter) or forget:
            raise typer.BadParameter("one of --expert, --adapter and --forget", param_hint="--expert")
        _print(commands.remove(model, expert=expert, adapter=adapter, out=out, record=record, key=key), as_json)
        return
    if forget is None or out is None:
        raise typer.BadParameter("both are needed", param_hint="--forget, --out")
    request = commands.Request(
        model, forget, retain, method.value, out, refusals, text, refuse, _layers(layers),
        at.value if at else None, merge, task, epochs, batch_size, learning_rate, seed, record, key,
    )  # fmt: skip
    result = commands.forget(request, lambda what: None if as_json else progress().print(what))
    _print(result, as_json)
    warn(result["warnings"])


def show_checks(result: Mapping[str, Any], as_json: bool) -> None:
    """What `potluck evaluate --forgotten` found."""
    if as_json:
        write_json(result)
    else:
        console = results()
        shown = table("model", "probability", "said", "ROUGE-L", "extraction strength")
        for name, forms in result["models"].items():
            for form, figures in forms.items():
                shown.add_row(f"{name}, {form}", *(f"{value:.3f}" for value in figures.values()))
        console.print(shown)
        for name in ("relearning_steps", "truth_ratio", "forget_quality"):
            for model, value in result.get(name, {}).items():
                console.print(f"{name.replace('_', ' ')}, {model}: {value:.4g}")
    warn(result["warnings"])


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(layer) for layer in text.split(",")) if text else ()
    except ValueError:
        raise typer.BadParameter(f"{text}: write numbers with commas between them", param_hint="--layers") from None


def _print(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        write_json(result)
        return
    console = results()
    before, after = result["before"], result["after"]
    if isinstance(before, dict):
        shown = table("", "before", "after")
        for name, value in before.items():
            shown.add_row(name.replace("_", " "), f"{value:.3f}", f"{after[name]:.3f}")
        console.print(shown)
    for name, value in result.items():
        if not isinstance(value, dict | list):
            console.print(f"{name.replace('_', ' ')}: {value}")
