"""Decoding together, from the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potluck.cli.options import JsonOption
from potluck.errors import RecipeError
from potluck.terminal import progress, table, warn, write, write_json

if TYPE_CHECKING:
    from rich.console import Console


def _together(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Decoding together", **more)


_RULES = "Who speaks when: `deferral`, `entropy`, `speculative`, `contrastive`, `proxy` or `glimpse`."
_THRESHOLD = "`deferral`: a probability; `entropy`, `glimpse`: nats; above it the assistant speaks."
AssistantOption = Annotated[
    list[str] | None, _together("A run, a model, an adapter on the first, or an endpoint `URL#NAME`.", metavar="PLACE")
]
RuleOption = Annotated[str | None, _together(_RULES)]
DeferralOption = Annotated[Path | None, _together("`deferral`: the folder of what was learnt.")]
ThresholdOption = Annotated[float | None, _together(_THRESHOLD, min=0.0)]
DraftOption = Annotated[int | None, _together("`speculative`: tokens drafted at a time.", min=1)]
StrengthOption = Annotated[float | None, _together("`contrastive`, `proxy`: of what is set against.", min=0.0)]
PlausibilityOption = Annotated[
    float | None, _together("`contrastive`: share of the likeliest token's probability.", min=1e-9, max=1.0)
]
DelimiterOption = Annotated[str | None, _together("`glimpse`: what ends a step; a line break if left out.")]
KeyOption = Annotated[
    str | None, _together("Environment variable that holds the API key of endpoints.", metavar="VARIABLE")
]


def defer(
    base: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="The base: a run folder or a model.")],
    assistants: Annotated[
        list[str], typer.Argument(metavar="ASSISTANT...", help="Runs, models, adapters, or endpoints `URL#NAME`.")
    ],
    data: Annotated[Path, typer.Option(help="A little text of all kinds: a folder of text files, or one file.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    rate: Annotated[float, typer.Option(min=0.0, max=1.0, help="Call assistants at this share of tokens.")] = 0.3,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens of a stretch of the text.")] = 256,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the text.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Decides the order of the text.")] = 0,
    api_key_env: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Learn when a base should let its assistants speak, for `potluck generate --rule deferral`."""
    from potluck.commands import defer as learn
    from potluck.compose.decoding.deferral import Lesson

    lesson = Lesson(rate=rate, sequence_length=sequence_length, epochs=epochs, seed=seed)
    found = learn(base, assistants, data, out, lesson, api_key_env or "")
    warn(found["warnings"])
    if as_json:
        write_json(found)
    else:
        _show_learnt(found, rate)


def continue_alone(
    source: Path, prompt: str, sampled: Mapping[str, Any], given: Mapping[str, Any], as_json: bool
) -> None:
    """Continue a text, or answer a chat turn, with one model.

    Raises:
        RecipeError: An option is for several.
    """
    from potluck.commands import generate

    idle = [name.replace("_", "-") for name, value in given.items() if value is not None]
    if idle:
        raise RecipeError(f"--{idle[0]} has no effect without an assistant", "name one: --assistant FOLDER_OR_URL")
    text, answers = generate(source, prompt, **sampled, say=progress().print)
    if as_json:
        write_json({"prompt": prompt, "text": text})
    else:
        write(text if answers else prompt + text)


def continue_together(
    source: Path,
    assistants: Sequence[str],
    prompt: str,
    sampled: Mapping[str, Any],
    given: Mapping[str, Any],
    key_from: str | None,
    as_json: bool,
) -> None:
    """Continue a text with several models, and say what each of them was asked.

    Raises:
        RecipeError: No rule is named, or the key is for nobody.
    """
    from potluck.commands import generate_together
    from potluck.compose.decoding.decode import Sampling
    from potluck.compose.decoding.factory import RULES, Choice

    if given["rule"] is None:
        raise RecipeError("who speaks when is not said", f"--rule {'|'.join(RULES)}")
    from potluck.local.generate import TEMPERATURE, TOP_P

    plain = {"temperature": TEMPERATURE, "top_p": TOP_P}  # several models have no config of their own
    settings: dict[str, Any] = {name: plain.get(name) if v is None else v for name, v in sampled.items()}
    max_tokens = settings.pop("max_tokens")
    found = generate_together(
        source, assistants, Choice(**given), prompt, max_tokens=max_tokens, sampling=Sampling(**settings),
        key_from=key_from or "",
    )  # fmt: skip
    warn(found["warnings"])
    if as_json:
        write_json(found)
    else:
        write(prompt + found["text"])
        _show_counts(found["models"], progress())


def _show_learnt(found: Mapping[str, Any], rate: float) -> None:
    width = max(map(len, found["nats_per_token"]))
    write(f"nats per token of {found['tokens']} tokens that the gates did not learn from:")
    for name, nats in found["nats_per_token"].items():
        write(f"  {name:{width}}  {nats:.4f}")
    write(f"assistants called at {found['called']:.1%} of tokens, at most {rate:.0%} were asked for")
    write(f"deferral: {found['deferral']}")


def _show_counts(models: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    from potluck.records.units import bytes_text

    shown = table("model", "tokens said", "calls", "foretold", "sent", "received", "seconds")
    for name, asked in models.items():
        sent, received = bytes_text(asked["sent_bytes"]), bytes_text(asked["received_bytes"])
        numbers = (str(asked[key]) for key in ("said", "calls", "predictions"))
        shown.add_row(name, *numbers, sent, received, f"{asked['seconds']:.2f}")
    console.print(shown)
