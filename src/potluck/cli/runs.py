"""The verbs of a run: plan, train, take part, look, evaluate, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from potluck.cli.decoding import (
    AssistantOption,
    DeferralOption,
    DelimiterOption,
    DraftOption,
    KeyOption,
    PlausibilityOption,
    RuleOption,
    StrengthOption,
    ThresholdOption,
    continue_alone,
    continue_together,
)
from potluck.cli.options import (
    BestOption,
    JsonOption,
    RecipeArgument,
    RoundOption,
    RunArgument,
    SetOption,
    flag,
    parsed,
    print_facts,
    print_result,
)
from potluck.terminal import progress, warn, write, write_json

verbs = typer.Typer()


@verbs.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the run; the file is NAME.toml.")] = "first",
    data: Annotated[
        list[Path] | None,
        typer.Option(help="A participant's folder of text, text or .jsonl file; a sample if left out."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a recipe with comments that can be run at once."""
    from potluck.beginning import begin
    from potluck.show import show_begun

    begun = begin(name, data or ())
    if as_json:
        write_json(begun)
    else:
        warn(begun["warnings"])
        show_begun(begun)


@verbs.command()
def check(recipe: RecipeArgument, settings: SetOption = None, as_json: JsonOption = False) -> None:
    """Validate a recipe, prepare its text as a run does, and say what a run costs, without running it."""
    from dataclasses import asdict

    from potluck.preflight import forecast
    from potluck.recipe import load_recipe
    from potluck.show import show_forecast

    expected = forecast(load_recipe(recipe, settings or ()), progress=progress().print)
    if as_json:
        write_json(asdict(expected))
    else:
        show_forecast(expected)


@verbs.command()
def plan(
    recipe: RecipeArgument,
    uplink: Annotated[str, typer.Option(help="Bandwidth from each participant, such as `20mbit`.")],
    downlink: Annotated[str, typer.Option(help="Bandwidth to each participant, such as `100mbit`.")],
    tokens_per_second: Annotated[float, typer.Option(min=1e-9, help="Speed of one participant's local steps.")],
    latency: Annotated[str, typer.Option(help="One-way delay of a message, such as `50ms` or `0.1s`.")] = "50ms",
    settings: SetOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw utilisation over H: a .png, .svg or .pdf.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Predict round times for other local steps, fragments and codecs on a link, and say which to take."""
    from dataclasses import asdict

    from potluck.planning import megabits, milliseconds, planned
    from potluck.recipe import load_recipe
    from potluck.recipe.sources import Profile
    from potluck.show import draw_plan, show_plan

    loaded = load_recipe(recipe, settings or ())
    link = Profile(
        steps_per_second=tokens_per_second / loaded.tokens_per_step,
        uplink=parsed(megabits, uplink, "--uplink"),
        downlink=parsed(megabits, downlink, "--downlink"),
        latency=parsed(milliseconds, latency, "--latency"),
    )
    found = planned(loaded, link)
    if plot is not None:
        draw_plan(found, plot)
    if as_json:
        write_json({"link": link.model_dump(exclude={"availability"}), **asdict(found)})
    else:
        show_plan(found)


@verbs.command()
def train(recipe: RecipeArgument, settings: SetOption = None, as_json: JsonOption = False) -> None:
    """Train one model together; export it and write a report."""
    from potluck.commands import train as run

    print_result(run(recipe, settings or (), progress()), as_json)


@verbs.command()
def resume(run: RunArgument, number: RoundOption = None, as_json: JsonOption = False) -> None:
    """Go on with a run or a comparison that was stopped or killed."""
    from potluck.commands import resume as go_on

    print_result(go_on(run, progress(), number), as_json)


@verbs.command()
def compare(
    recipe: RecipeArgument,
    settings: SetOption = None,
    pooled: Annotated[bool, flag(help="Also train on everybody's text in one place.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Train together, each participant alone, and pooled; compare on everybody's held-out text."""
    from potluck.commands import compare as run

    print_result(run(recipe, settings or (), progress(), pooled), as_json)


@verbs.command()
def host(
    recipe: RecipeArgument,
    settings: SetOption = None,
    listen: Annotated[str, typer.Option(help="Where the message server listens, `HOST:PORT`.")] = "0.0.0.0:4222",
    advertise: Annotated[
        list[str] | None, typer.Option(help="`HOST` or `HOST:PORT` by which participants reach it.")
    ] = None,
    server: Annotated[str | None, typer.Option(help="A server that is there already, `tls://HOST:PORT`.")] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="What that server shows, PEM; else the system's authorities vouch for it.")
    ] = None,
    key: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PUBLIC", help="A participant's own public key.")
    ] = None,
    rotate: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Make a new key for a participant, or a new `certificate`.")
    ] = None,
    insecure_loopback: Annotated[bool, flag("--insecure-loopback", help="No TLS; only on this machine.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Coordinate a run whose participants join from machines of their own; started again, go on with it."""
    from potluck.engine.nats.addresses import server_url, split_address
    from potluck.engine.nats.host_keys import Place
    from potluck.machines import Hosting
    from potluck.machines import host as run

    address, port = parsed(split_address, listen, "--listen")
    if insecure_loopback and address == "0.0.0.0":
        address = "127.0.0.1"
    for option, texts in (("--advertise", advertise or ()), ("--server", [server] if server else ())):
        for text in texts:
            parsed(lambda text: server_url(text, "tls"), text, option)
    place = Place(
        host=address, port=port, advertised=tuple(advertise or ()), secure=not insecure_loopback, url=server or "",
        certificate=certificate,
    )  # fmt: skip
    pairs = [item.partition("=") for item in key or ()]
    hosting = Hosting(place=place, own_keys={name: public for name, _, public in pairs}, rotate=rotate or ())
    print_result(run(recipe, settings or (), hosting, progress()), as_json)


@verbs.command()
def local(recipe: RecipeArgument, settings: SetOption = None, as_json: JsonOption = False) -> None:
    """Host a run and join it, on this machine: a process for the coordinator and one for each participant."""
    from potluck.side_by_side import local as run

    result, code = run(recipe, settings or (), progress().print)
    if as_json or not code:
        print_result(result, as_json)
    raise typer.Exit(code)


@verbs.command()
def join(
    url: Annotated[
        str | None, typer.Argument(metavar="URL", help="The server; that of the invite if left out.")
    ] = None,
    invite: Annotated[Path | None, typer.Option(help="The invite, a secret.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="This participant's text: a folder of text files, a text or .jsonl file.")
    ] = None,
    part: Annotated[Path | None, typer.Option(help="This participant's own part of the recipe, a TOML file.")] = None,
    model: Annotated[Path | None, typer.Option(help="Own copy of the model folder that the run goes on from.")] = None,
    device: Annotated[str | None, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:N`.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="Allow this kind of task, too.")] = None,
    max_local_steps: Annotated[int | None, typer.Option(min=1, help="Local steps in one task, at most.")] = None,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Tensors of one message, at most.")] = None,
    limit: Annotated[
        list[str] | None, typer.Option(metavar="KEY=NUMBER", help="Leave after so many `rounds`, `hours` or `bytes`.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where its state is kept; `joined/...` if left out.")] = None,
    key: Annotated[Path | None, typer.Option(help="Own key file, if the invite holds none.")] = None,
    make_key: Annotated[Path | None, typer.Option(help="Make a key, print its public half, and leave.")] = None,
    ask: Annotated[bool, flag("--ask", help="Ask before joining.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take part in a run with one's own text, which stays here; dial out to one port only."""
    from potluck.machines import Joining, make_own_key, own_part
    from potluck.machines import join as run

    if make_key is not None:
        print_result(make_own_key(make_key), as_json)
        return
    if invite is None:
        raise typer.BadParameter("must be given", param_hint="--invite")
    limits = dict(item.partition("=")[::2] for item in limit or ())
    mine = own_part(part, data, model, device, allow or (), max_local_steps, max_bytes, limits)
    print_result(run(url, invite, mine, Joining(folder=folder, key=key, ask=ask), progress()), as_json)


@verbs.command()
def status(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="A run folder; of a hosted run, on the coordinator's machine.")
    ] = None,
    invite: Annotated[Path | None, typer.Option(help="The watcher's invite, elsewhere.")] = None,
    watch: Annotated[bool, flag("--watch", help="Look again and again until the run ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """How far a run is, and who is there; of a run that goes on or is over, here or elsewhere."""
    from potluck.status import follow, run_status, shown, wait_for_run
    from potluck.terminal import results

    if watch:
        tell = (lambda found: write(json.dumps(found))) if as_json else None
        if run is not None and invite is None:
            wait_for_run(run, progress().print)
        follow(lambda: run_status(run, invite), tell)
    elif as_json:
        write_json(run_status(run, invite))
    else:
        results().print(shown(run_status(run, invite)))


@verbs.command()
def doctor(
    invite: Annotated[Path, typer.Option(help="The invite of whoever cannot join.")],
    key: Annotated[Path | None, typer.Option(help="Own key file, if the invite holds none.")] = None,
    folder: Annotated[Path, typer.Option(help="Where state would be kept: is there room?")] = Path("joined"),
    as_json: JsonOption = False,
) -> None:
    """Test what joining needs: reachability, TLS, key, permissions, clock, disk, bandwidth."""
    from potluck.looking import examine_access, show_findings

    found = examine_access(invite, key, folder)
    if as_json:
        write_json(found)
    else:
        show_findings(found)
    if not found["ok"]:
        raise typer.Exit(11)


@verbs.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder; with --edits, or a model folder.")],
    model: Annotated[Path | None, typer.Option(help="Evaluate this model folder in place of the run's model.")] = None,
    number: RoundOption = None,
    best: BestOption = False,
    edits: Annotated[Path | None, typer.Option(help="Ask a model folder, or RUN/model, whether edits hold.")] = None,
    forgotten: Annotated[Path | None, typer.Option(help="Ask a model folder whether these questions are gone.")] = None,
    task: Annotated[str, typer.Option(help="With --forgotten: of TOFU's files, this task's questions alone.")] = "",
    before: Annotated[Path | None, typer.Option(help="With --edits or --forgotten: the model before.")] = None,
    never: Annotated[Path | None, typer.Option(help="With --forgotten: a model that never knew them.")] = None,
    text: Annotated[Path | None, typer.Option(help="With --edits: text whose loss is measured, too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Bits per byte of a run's model on every participant's held-out text; or whether edits, or a forgetting, hold."""
    idle = [("--task", task), ("--never", never)] if forgotten is None else [("--edits", edits), ("--text", text)]
    for option, value in idle:
        if value:
            why = "only with --forgotten" if forgotten is None else "has no effect with --forgotten"
            raise typer.BadParameter(why, param_hint=option)
    if edits is None and forgotten is None:
        for option, value in (("--before", before), ("--text", text)):
            if value is not None:
                raise typer.BadParameter("only with --edits", param_hint=option)
        from potluck.commands import evaluate as measure

        print_result(measure(run, progress(), model, number, best), as_json)
        return
    for option, given in (("--model", model), ("--round", number), ("--best", best)):
        if given:
            raise typer.BadParameter("has no effect with --edits or --forgotten", param_hint=option)
    place = run / "model" if (run / "run.json").exists() else run
    if forgotten is not None:
        from potluck.cli.forget import show_checks
        from potluck.edit.forgetting.checking import check_forgotten

        found = check_forgotten(place, forgotten, before, never, task, progress().print)
        show_checks(found, as_json)
        return
    assert edits is not None
    from potluck.edit.evaluating import evaluate_edits

    print_facts(evaluate_edits(place, edits, before, text), as_json)


_TEMPERATURE = "0 takes the likeliest token each time; if left out, the model's own, or 0.8."
_TOP_P = "Draw from this share of probability; if left out, the model's own, or 0.95."
_RAW = "Continue the prompt as a text, though the model has a chat template."


@verbs.command()
def generate(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder or an exported model.")],
    prompt: Annotated[str, typer.Option(help="The text to continue, or what the user says.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation, in tokens.")] = 128,
    temperature: Annotated[float | None, typer.Option(min=0.0, help=_TEMPERATURE)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.01, max=1.0, help=_TOP_P)] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    raw: Annotated[bool, flag("--raw", help=_RAW)] = False,
    assistant: AssistantOption = None,
    rule: RuleOption = None,
    deferral: DeferralOption = None,
    threshold: ThresholdOption = None,
    draft: DraftOption = None,
    strength: StrengthOption = None,
    plausibility: PlausibilityOption = None,
    delimiter: DelimiterOption = None,
    api_key_env: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text, or answer a chat turn, with a trained model, alone or together with others."""
    sampled = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    given = {
        "rule": rule, "deferral": deferral, "threshold": threshold, "draft": draft, "strength": strength,
        "plausibility": plausibility, "delimiter": delimiter,
    }  # fmt: skip
    if assistant:
        if raw:
            raise typer.BadParameter("has no effect with --assistant: the prompt is continued", param_hint="--raw")
        continue_together(source, assistant, prompt, sampled, given, api_key_env, as_json)
    else:
        continue_alone(source, prompt, {**sampled, "raw": raw}, {**given, "api_key_env": api_key_env}, as_json)


@verbs.command()
def export(
    run: RunArgument,
    to: Annotated[Path | None, typer.Option(help="Folder to write; RUN/model if left out.")] = None,
    number: RoundOption = None,
    best: BestOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model folder that `transformers` loads, with tokenizer and model card."""
    from potluck.commands import export as write

    print_result(write(run, to, number, best), as_json)


@verbs.command()
def report(run: RunArgument, as_json: JsonOption = False) -> None:
    """Write report.html and report.json for a run or a comparison."""
    from potluck.records.report import write_report

    print_result({"report": str(write_report(run))}, as_json)
