"""The verbs that build from parts: merge, library, expert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from potluck.cli.decoding import defer
from potluck.cli.experts import expert
from potluck.cli.library import library
from potluck.cli.options import JsonOption, print_result

verbs = typer.Typer()
verbs.add_typer(library, name="library")
verbs.add_typer(expert, name="expert")
expert.command("defer")(defer)


def _panel(title: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=title, **more)


_METHODS = (
    "Adapters: `svd`, `sum`, `lego`, `regmean`, `fisher`. Full models: `linear`, `slerp`, `multislerp`, `model_stock`, "
    "`delta_guided`. Both: `task_arithmetic`, `magnitude`, `ties`, `dare_linear`, `dare_ties`, `della`, `sce`."
)
_ADAPTERS, _SETTINGS = "For adapters", "Settings of methods"
PartsArgument = Annotated[list[Path], typer.Argument(metavar="PART...", help="Folders of adapters, or of full models.")]
NewFolderOption = Annotated[Path, typer.Option(help="The folder to write, a new one.")]
MethodOption = Annotated[str, typer.Option(metavar="METHOD", help=_METHODS)]
WeightsOption = Annotated[str | None, typer.Option(metavar="W1,W2,...", help="One for each part; even if left out.")]
RankOption = Annotated[int | None, _panel(_ADAPTERS, "Of the merged adapter, at most.", min=1)]
IntoBaseOption = Annotated[Path | None, _panel(_ADAPTERS, "Add the result to this base, and write a full model.")]
StatisticsOption = Annotated[list[Path] | None, _panel(_ADAPTERS, "Of each adapter in turn, if not beside it.")]
BaseOption = Annotated[Path | None, typer.Option(help="What the parts were trained from; adapters are held to it.")]
DataOption = Annotated[
    Path | None, typer.Option(help="Text to compare the result with the base on: a folder of text files, or one file.")
]
DensityOption = Annotated[float | None, _panel(_SETTINGS, "Share of entries that stay.")]
ScaleOption = Annotated[float | None, _panel(_SETTINGS, "Factor of what is added to the base.", "--lambda")]
EpsilonOption = Annotated[float | None, _panel(_SETTINGS, "`della`: half the range of densities.")]
SignOption = Annotated[str | None, _panel(_SETTINGS, "Elected by `total` or by `frequency`.")]
DivisorOption = Annotated[str | None, _panel(_SETTINGS, "Of what agrees: `weights` as mergekit, `count` as PEFT.")]
SelectOption = Annotated[float | None, _panel(_SETTINGS, "`sce`: share of entries that stay.")]
EnergyOption = Annotated[float | None, _panel(_SETTINGS, "`svd`: share of the squares to keep, in every map.")]
RidgeOption = Annotated[float | None, _panel(_SETTINGS, "`regmean`: share of the diagonal that is added.")]
OffDiagonalOption = Annotated[float | None, _panel(_SETTINGS, "`regmean`: factor of what is off the diagonal.")]
FloorOption = Annotated[float | None, _panel(_SETTINGS, "`fisher`: share of the mean that is added.")]
ReweightParametersOption = Annotated[
    bool | None, _panel(_SETTINGS, "`lego`: centres get their cluster's norm.", metavar="")
]
ReweightOutputOption = Annotated[bool | None, _panel(_SETTINGS, "`lego`: units are scaled by √(r / k).", metavar="")]
PowerOption = Annotated[float | None, _panel(_SETTINGS, "`delta_guided`: of a task vector's norm.")]
StepsOption = Annotated[int | None, _panel(_SETTINGS, "`multislerp`: at most.", min=1)]
SeedOption = Annotated[int | None, _panel(_SETTINGS, "Of what is drawn.")]


@verbs.command()
def merge(
    parts: PartsArgument,
    out: NewFolderOption,
    method: MethodOption,
    weights: WeightsOption = None,
    rank: RankOption = None,
    into_base: IntoBaseOption = None,
    statistics: StatisticsOption = None,
    base: BaseOption = None,
    data: DataOption = None,
    density: DensityOption = None,
    scale: ScaleOption = None,
    epsilon: EpsilonOption = None,
    sign: SignOption = None,
    divisor: DivisorOption = None,
    select: SelectOption = None,
    energy: EnergyOption = None,
    ridge: RidgeOption = None,
    off_diagonal: OffDiagonalOption = None,
    floor: FloorOption = None,
    reweight_parameters: ReweightParametersOption = None,
    reweight_output: ReweightOutputOption = None,
    power: PowerOption = None,
    steps: StepsOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge adapters of one base, or full models of one shape, that were trained apart."""
    from potluck.compose.merging.request import Request, carry_out

    settings = {
        "density": density, "scale": scale, "epsilon": epsilon, "sign": sign, "divisor": divisor, "select": select,
        "energy": energy, "ridge": ridge, "off_diagonal": off_diagonal, "floor": floor,
        "reweight_parameters": reweight_parameters, "reweight_output": reweight_output, "power": power,
        "steps": steps, "seed": seed,
    }  # fmt: skip
    given = {name: value for name, value in settings.items() if value is not None}
    shares = None if weights is None else numbers(weights, "--weights")
    request = Request(parts, out, method, given, shares, rank, base, into_base, statistics or (), data)
    print_result(carry_out(request), as_json)


def numbers(text: str, option: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text}: write numbers with commas between them", param_hint=option) from None


@expert.command("fuse")
def fuse(
    models: Annotated[list[str], typer.Argument(metavar="[NAME=]MODEL...", help="Model folders of one vocabulary.")],
    out: NewFolderOption,
    primary: Annotated[str | None, typer.Option(help="Whose model it begins as; the first if left out.")] = None,
    width: Annotated[int, typer.Option(min=1, help="Common width of what the head compares.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the head's first projections.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Put frozen models of any shape into one, whose small head `potluck train` can train."""
    from potluck.compose.fusion import fuse_models

    folders = [Path(model.partition("=")[2] or model) for model in models]
    names = [model.partition("=")[0] if "=" in model else Path(model).name for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise typer.BadParameter(f"two models are named {twice}: write NAME=MODEL", param_hint="MODEL")
    named = dict(zip(names, folders, strict=True))
    print_result(fuse_models(named, out, primary or names[0], width, seed), as_json)
