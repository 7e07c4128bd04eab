"""The verbs of experts: train one apart, assemble what several trained, remove one."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from potluck.cli.options import JsonOption, flag, print_result
from potluck.terminal import telling

expert = typer.Typer(no_args_is_help=True, help="Train an expert apart, assemble what several trained, remove one.")


class Part(StrEnum):
    """What a participant trains."""

    adapter = "adapter"
    low_rank = "low-rank"
    full = "full"


class Form(StrEnum):
    """What a mixture is written as."""

    mixture = "mixture"
    flex_olmo = "flex-olmo"


BaseArgument = Annotated[Path, typer.Argument(metavar="BASE", help="The model folder that all experts stand beside.")]
NewFolderOption = Annotated[Path, typer.Option(help="The folder to write, a new one.")]
DeviceOption = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:N`.")]


@expert.command("train")
def train(
    base: BaseArgument,
    data: Annotated[Path, typer.Option(help="This participant's text: a folder of text files, or one file.")],
    out: NewFolderOption,
    part: Annotated[
        Part, typer.Option("--as", help="An expert of the base's size, one of low rank, or a plain adapter.")
    ],
    public: Annotated[
        Path | None,
        typer.Option(help="Public text, the same for all; experts need it. What a part does to it is measured."),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of an adapter or a low-rank expert; 8 if left out.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a step.")] = 8,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")] = 128,
    learning_rate: Annotated[
        float | None,
        typer.Option(min=1e-9, help="Peak of AdamW; by part and width if left out."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the text and of the start.")] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a part on one's own text beside a frozen base; nobody else need be there."""
    from potluck.compose.experts.requests import train as run
    from potluck.compose.training import Lesson

    lesson = Lesson(steps, batch_size, sequence_length, learning_rate, seed, device)
    told = max(1, steps // 20)
    with telling() as say:
        found = run(
            base, data, out, part.value, lesson, rank=rank, public=public,
            on_step=lambda step: say(f"step {step} of {steps}") if step % told == 0 else None,
        )  # fmt: skip
    print_result(found, as_json)


@expert.command("assemble")
def assemble(
    base: BaseArgument,
    experts: Annotated[list[Path], typer.Argument(metavar="EXPERT...", help="Folders written by `expert train`.")],
    out: NewFolderOption,
    top_k: Annotated[int, typer.Option(min=1, help="Experts that a token gets at most, beside the base's own.")] = 4,
    bias: Annotated[float, typer.Option(max=0.0, help="The lower, the more is left to the base.")] = 0.0,
    public: Annotated[Path | None, typer.Option(help="Public text to tune the router on.")] = None,
    router_steps: Annotated[int, typer.Option(min=0, help="Steps of tuning the router.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of tuning the router.")] = 0,
    form: Annotated[Form, typer.Option("--as", help="Our own class, or FlexOlmo where that is possible.")] = (
        Form.mixture
    ),
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Put experts that were trained apart beside their base, as one model."""
    from potluck.compose.experts.requests import Mixed
    from potluck.compose.experts.requests import assemble as run

    print_result(run(base, experts, out, Mixed(form.value, top_k, bias, router_steps, seed), public, device), as_json)


@expert.command("remove")
def remove(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder written by `expert assemble`.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the expert's folder when it was trained.")],
    out: NewFolderOption,
    public: Annotated[Path | None, typer.Option(help="The text the router was tuned on, to tune it anew.")] = None,
    untuned: Annotated[bool, flag("--untuned", help="Go on with the router as before it was tuned.")] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write the model as if this expert had never been in it, bit for bit."""
    from potluck.compose.experts.requests import remove as run

    print_result(run(model, name, out, public, untuned=untuned, device=device), as_json)
