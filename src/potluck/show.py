"""Results of verbs, for people, on standard output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from rich.console import Console
from rich.table import Table
from rich.text import Text

from potluck.errors import MissingExtra, StorageError
from potluck.measured import PARAMETERS, WHERE
from potluck.planning import ENOUGH, PERIODS, Plan, Setting
from potluck.preflight import Forecast
from potluck.records.charts import PALETTE
from potluck.records.live import comparison_table
from potluck.records.units import bytes_text, count_text, duration_text
from potluck.sent import WHAT
from potluck.terminal import labelled, results, table, warn

if TYPE_CHECKING:  # they load torch
    from potluck.asking import Asks
    from potluck.engine.nats.identity import Invite
    from potluck.recipe.part import Part
    from potluck.sent import Sent


def show_forecast(expected: Forecast) -> None:
    """What a run of the recipe needs."""
    most = "at most " if expected.download_is_bound else ""
    largest = []
    if expected.peak_update_bytes > expected.update_bytes:
        largest = [("the largest", _ways(expected.peak_update_bytes, expected.peak_download_bytes, most))]
    at_most = "at most " if expected.vocabulary_is_bound else ""
    in_all = []
    if expected.process_bytes is not None:
        in_all = [
            ("memory, in all", f"about {bytes_text(expected.process_bytes)} at its peak, in one process on the CPU")
        ]
    rows = [
        ("participants", f"{len(expected.participants)}, {expected.asked_per_round} asked each round"),
        (
            "parameters",
            f"{at_most}{count_text(expected.parameters)} with a vocabulary of {at_most}{expected.vocabulary_size}",
        ),
        ("rounds", f"{expected.rounds} of {expected.local_steps} local steps"),
        ("tokens", f"{count_text(expected.tokens_per_round)} a round, {count_text(expected.total_tokens)} in all"),
        ("a round, each", _ways(expected.update_bytes, expected.download_bytes, most)),
        *largest,
        ("the whole run", f"{_ways(expected.up_bytes, expected.down_bytes, most)}, all participants"),
        ("memory, local steps", f"about {bytes_text(expected.device_bytes)}"),
        (
            "memory, participants",
            f"{bytes_text(expected.participant_bytes)} of state each, "
            f"{bytes_text(expected.participant_bytes * len(expected.participants))} in one process",
        ),
        ("memory, coordinator", bytes_text(expected.coordinator_bytes)),
        *in_all,
        (
            "disk",
            f"about {bytes_text(expected.disk_bytes)}: checkpoints of {bytes_text(expected.checkpoint_bytes)}, every "
            + ("round" if expected.checkpoint_every == 1 else f"{expected.checkpoint_every} rounds"),
        ),
        ("evaluation", _evaluation(expected)),
        ("epochs", "unknown" if expected.epochs is None else f"about {expected.epochs:.1f} over the least text"),
    ]
    facts = table("", "", show_header=False)
    for name, value in rows:
        facts.add_row(Text(name, style="dim"), value)
    texts = table("participant", "training text", "documents", "held out", "documents", title="Text found")
    for name, text in expected.texts.items():
        texts.add_row(name, *(["where it joins from"] if text is None else _sides(text)))
    console = results()
    console.print(texts, facts, sep="\n")
    warn(expected.warnings, console)
    console.print("ok", style="green")


def show_begun(begun: Mapping[str, Any]) -> None:
    """What `potluck init` wrote, and what comes next."""
    recipe, console = begun["recipe"], results()
    console.print(f"recipe: {recipe}, of {', '.join(begun['participants'])}")
    for verb in ("check", "local"):
        console.print(f"  potluck {verb} {recipe}")


def show_plan(plan: Plan) -> None:
    """Every setting in a grid of codecs and local steps, and the one to take."""
    console = results()
    periods = sorted({setting.period for setting in plan.settings})
    sizes, grid = _table("codec", "up", "down"), _table("codec", "P, τ", *(f"H {period}" for period in periods))
    places = {(setting.codec, _layout(setting), setting.period): setting for setting in plan.settings}
    for codec, layout in dict.fromkeys(place[:2] for place in places):
        row = [places.get((codec, layout, period)) for period in periods]
        grid.add_row(codec, layout, *(_cell(setting, plan) if setting else "" for setting in row))
        if layout == "1, 0":
            blocking = next(setting for setting in row if setting)
            sizes.add_row(codec, bytes_text(blocking.up_bytes), bytes_text(blocking.down_bytes))
    console.print(sizes, "", grid, "", Text(_LEGEND, style="dim"), "", sep="\n")
    for words, style, setting in (("the recipe as it is", "", plan.current), ("to take", "bold", plan.choice)):
        labelled(console, words, style, "nothing that was measured" if setting is None else _in_words(setting))
    console.print(f"why: {plan.reason}\n\n{tomli_w.dumps(plan.tables)}")
    measured = f"what was measured ({WHERE}) is of {count_text(PARAMETERS)} parameters"
    labelled(console, "Quality is not predicted", "yellow", f"{measured} and plain averaging; try it on your model")


def _in_words(setting: Setting) -> str:
    return (
        f"{setting.codec}, P, τ = {_layout(setting)}, H = {setting.local_steps * setting.fragments}; "
        f"a round {duration_text(setting.round_seconds)}, {bytes_text(setting.up_bytes)} up, "
        f"{bytes_text(setting.down_bytes)} down; {setting.utilisation:.1%} local steps; "
        f"the run {duration_text(setting.total_seconds)}; {setting.measured}"
    )


_LEGEND = """\
up, down: what a participant sends and gets to exchange the whole model once; with P fragments, in P rounds.
P fragments take turns, and τ local steps go on while one travels. H: local steps between two exchanges of the
same parameters; a round has H / P. A cell: a round and the share of it that is local steps; below, the whole run
without evaluations. Green: at least 95%. Its loss: * was measured near full precision's, ! was measured worse;
the others were not measured, and are not recommended."""


def draw_plan(plan: Plan, path: Path) -> None:
    """Utilisation over H for each codec, blocking beside fragments, as a picture; the suffix names the format.

    Raises:
        MissingExtra: matplotlib is not installed.
        StorageError: The file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("a plot needs matplotlib", "pip install 'potluck[report]'") from None
    layouts = list(dict.fromkeys(map(_layout, plan.settings)))
    figure = Figure(figsize=(1.9 + 2.9 * len(layouts), 3.8), layout="constrained")
    grid = figure.subplots(1, len(layouts), sharex=True, sharey=True, squeeze=False)[0]
    for axes, layout in zip(grid, layouts, strict=True):
        _draw_layout(axes, plan, layout)
    grid[0].set_ylabel("time in local steps, %")
    found = {label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside right upper", frameon=False, fontsize=9)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: the plot cannot be written ({error})") from None


def show_result(result: Mapping[str, Any]) -> None:
    """A verb's result: tables where there are some, then the plain facts."""
    console = results()
    if "rows" in result:
        console.print(comparison_table(result))  # type: ignore[arg-type]
    if "participants" in result:
        shown = table("held-out text", "bits per byte", "tokens")
        for name, row in (*result["participants"].items(), ("union", result["union"])):
            shown.add_row(name, f"{row['bits_per_byte']:.4f}", count_text(row["tokens"]))
        console.print(shown)
    facts = ("run", "round", "rounds", "total_tokens", "bits_per_byte", "model", "report")
    for key in (*facts, "participant", "ended", "tasks", "worked_seconds", "sent", "folder", "public", "key"):
        if result.get(key) is not None:
            console.print(f"{key.replace('_', ' ')}: {result[key]}")


def show_facts(result: Mapping[str, Any]) -> None:
    """A result of figures: each on a line, and of nested ones a table."""
    console = results()
    for key, value in result.items():
        label = key.replace("_", " ")
        if isinstance(value, Mapping):
            shown = table(label, *map(str, range(len(next(iter(value.values()))))))
            for name, row in value.items():
                shown.add_row(name, *(f"{number:.2f}" for number in row))
            console.print(shown)
        elif value is not None:
            text = f"{value:.4g}" if isinstance(value, float) else value
            console.print(f"{label}: {', '.join(map(str, text)) if isinstance(text, list) else text}")


def show_asks(asks: Asks, part: Part, invite: Invite, sent: Sent, console: Console) -> None:
    """What a run asks of a participant, beside what the participant allows, and what will leave, before it joins."""
    policy = part.policy
    shown = table("", "the run asks", "this participant allows")
    shown.title = f"{invite.participant} in {asks.recipe} (run {invite.run}, {' '.join(invite.urls)})"
    parameters = "known once it begins" if asks.parameters is None else count_text(asks.parameters)
    message = "known once it begins" if asks.message_bytes is None else bytes_text(asks.message_bytes)
    for row in (
        ("tasks", ", ".join(asks.kinds), ", ".join(policy.kinds)),
        ("local steps a task", str(asks.local_steps), f"at most {policy.max_local_steps}"),
        ("rounds", f"{asks.rounds} of {count_text(asks.tokens_per_round)} tokens", ""),
        ("parameters", parameters, f"at most {count_text(policy.max_parameters)}"),
        ("large messages in", asks.blobs, ", ".join(["jetstream", *policy.stores])),
        ("a message", message, f"at most {bytes_text(policy.max_bytes)}"),
        (
            "the server",
            f"certificate {invite.fingerprint[:16]}..." if invite.fingerprint else "no pinned certificate",
            "",
        ),
    ):
        shown.add_row(*row)
    console.print(shown)
    for line in _leaving(asks, part, sent):
        console.print(line)


def _leaving(asks: Asks, part: Part, sent: Sent) -> Iterator[str]:
    """What stays and what leaves, in sentences that no table cuts."""
    source = part.source.model_dump(exclude_defaults=True)
    yield f"text, stays here: {', '.join(f'{key} {value}' for key, value in source.items())}"
    yield "leaves this machine:"
    for what in dict.fromkeys(WHAT[kind] for kind in asks.kinds):
        yield f"  - {what}"
    yield "  - signs of life: how much text it holds and its hash, device and versions, what it is doing"
    if asks.message_bytes is not None:
        yield f"  updates: at most {bytes_text(asks.message_bytes)} a round, {asks.rounds} rounds"
    limits = part.limits.model_dump(exclude_none=True)
    said = ", ".join(f"{key} {value:,}" for key, value in limits.items()) or "none; it stays until the run is over"
    yield f"limits in all: {said}"
    yield f"every answer is noted before it leaves: {sent.path.absolute()}"


def _evaluation(expected: Forecast) -> str:
    if expected.evaluation_tokens is None:
        return "of held-out text where participants join from"
    share = "" if expected.evaluation_share is None else f", {expected.evaluation_share:.0%} of the local steps' work"
    return f"{count_text(expected.evaluation_tokens)} tokens of held-out text each time{share}"


def _sides(text: Mapping[str, Any]) -> Iterator[str]:
    for side in ("train", "validation"):
        tokens, documents = text[f"{side}_tokens"], text[f"{side}_documents"]
        yield f"{count_text(tokens)} tokens" if documents else "nothing"
        yield f"{documents:,}"


def _ways(up: int, down: int, most: str) -> str:
    return f"{bytes_text(up)} up, {most}{bytes_text(down)} down"


def _draw_layout(axes: Any, plan: Plan, layout: str) -> None:
    """Utilisation over H with one number of fragments and one overlap."""
    codecs = list(dict.fromkeys(setting.codec for setting in plan.settings))
    families = list(dict.fromkeys(codec.partition(",")[0] for codec in codecs))
    for codec in codecs:
        family, both, _ = codec.partition(",")
        points = [setting for setting in plan.settings if (setting.codec, _layout(setting)) == (codec, layout)]
        x, y = [s.local_steps * s.fragments for s in points], [100 * s.utilisation for s in points]
        colour = PALETTE[families.index(family) % len(PALETTE)]
        axes.plot(x, y, "--" if both else "-", marker="o", markersize=3, color=colour, label=codec)
    if plan.choice is not None and layout == _layout(plan.choice):
        place = plan.choice.local_steps * plan.choice.fragments, 100 * plan.choice.utilisation
        axes.plot(*place, "o", markersize=12, fillstyle="none", color="black", label="to take")
    axes.axhline(100 * ENOUGH, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(PERIODS, [str(period) for period in PERIODS], fontsize=7)
    axes.minorticks_off()
    axes.set_title(f"P, τ = {layout}", fontsize=10)
    axes.set_xlabel("H, local steps")
    axes.grid(alpha=0.25)


def _table(*names: str) -> Table:
    made = table(*names)
    for place, column in enumerate(made.columns):
        column.justify, column.no_wrap = "right" if place else "left", place < 2
    return made


def _layout(setting: Setting) -> str:
    """Fragments and overlap."""
    eager = setting.overlap == setting.local_steps
    return f"{setting.fragments}, {'all' if eager else setting.overlap}"


def _cell(setting: Setting, plan: Plan) -> Text:
    style = "green" if setting.utilisation >= ENOUGH else "default"
    style += " bold reverse" if setting == plan.choice else " underline" if setting == plan.current else ""
    share = f"{duration_text(setting.round_seconds)} {setting.utilisation:.0%}"
    mark = {True: "*", False: "!", None: " "}[setting.near]
    return Text.assemble((share, style), f"{mark}\n{duration_text(setting.total_seconds)} ")
