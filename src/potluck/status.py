"""`potluck status`: where a run stands and who is there, once or until it ends.

The event log in the run folder says how far a run of any kind is. While a hosted run is on, the message server says who
is there; from another machine, with the watcher's invite, it says all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live

from potluck.engine.nats.host_keys import WATCHER
from potluck.errors import EngineError, InviteError, RunFolderError
from potluck.looking import server_status
from potluck.recipe.engine import Nats
from potluck.records.curves import RunRecord, read_run
from potluck.records.folder import check_run, how_to_go_on, in_use, open_run, runs_in
from potluck.records.units import bytes_text, count_text, one_line
from potluck.terminal import results, table

Found = dict[str, Any]
WATCH_SECONDS = 2.0
SILENCE_SECONDS = 30.0
ENDED = ("finished", "stopped")
_FIGURES = ("round", "rounds", "bits_per_byte")


def run_status(folder: Path | None, invite: Path | None) -> Found:
    """How far a run is, and who is there.

    Args:
        folder: The run's folder, on the machine that trains or coordinates it ...
        invite: ... or the watcher's invite, elsewhere.

    Returns:
        ``state`` is ``waiting`` for participants, ``working``, ``stopped`` or ``finished``; of a comparison, ``runs``.

    Raises:
        InviteError: Neither or both, or an invite that is not the watcher's.
        RunFolderError: There is no run in the folder.
        EngineError: With an invite: the server cannot be reached.
    """
    if (folder is None) == (invite is None):
        raise InviteError("name a run folder, or the watcher's invite with --invite: one of them")
    if folder is None:
        assert invite is not None
        found = server_status(invite)
        progress = found["coordinator"]
        ended, begun = progress.get("event") == "run_finished", "round" in progress
        state = "finished" if ended else "working" if begun else "waiting"
        return {**found, "state": state, **{key: progress.get(key) for key in _FIGURES}}
    recipe, variant = open_run(folder)
    if variant.kind == "comparison":
        places = [folder / "together", *sorted(folder.glob("alone/*")), folder / "pooled"]
        runs = {str(p.relative_to(folder)): _of_folder(p) for p in places if (p / "run.json").exists()}
        done = len(runs) == len(variant.trainers) + 1 and all(run["state"] == "finished" for run in runs.values())
        state = "finished" if done else "working" if in_use(folder) else "stopped"
        return {"recipe": recipe.name, "folder": str(folder), "state": state, "runs": runs}
    return _of_folder(folder)


def _of_folder(folder: Path) -> Found:
    """One run, from its events; while it is hosted, also from its server."""
    recipe, variant = open_run(folder)
    found: Found = {"recipe": recipe.name, "folder": str(folder), "state": "stopped", "round": None}
    found |= {"rounds": recipe.rounds.count, "participants": {name: {} for name in variant.trainers}}
    try:
        record = read_run(folder)
    except RunFolderError:  # not begun
        record = None
    if record is not None:
        found |= _progress(record)
    if found["state"] == "finished" or not in_use(folder):
        found["go_on"] = how_to_go_on(folder)
        return found
    found["state"] = "waiting" if record is None else "working"
    invite = folder / "host" / "invites" / f"{WATCHER}.toml"
    if isinstance(recipe.engine, Nats) and invite.exists():
        try:
            here = server_status(invite)
        except (EngineError, InviteError) as error:  # it starts, or is away; the coordinator says so
            found["server"] = str(error)
        else:
            found |= {"run": here["run"], "coordinator": here["coordinator"]}
            for name, facts in here["participants"].items():
                found["participants"][name] = {**facts, **found["participants"].get(name, {})}
    return found


def _progress(record: RunRecord) -> Found:
    """What the events say."""
    measured = record.evaluations[-1] if record.evaluations else None
    union = measured.union if measured is not None else None
    people: dict[str, Found] = {
        name: {"up_bytes": record.transferred("up_bytes", name), "down_bytes": record.transferred("down_bytes", name)}
        for name in record.trainers
    }
    for item in record.contributions:
        people.setdefault(item.participant, {})["last"] = {
            "round": item.round, "status": item.status, "reason": item.reason, "loss": item.loss
        }  # fmt: skip
    for name, held_out in (measured.participants if measured is not None else {}).items():
        people.setdefault(name, {})["bits_per_byte"] = held_out.bits_per_byte
    return {
        "state": "finished" if record.finished else "stopped",
        "round": record.rounds[-1].round if record.rounds else 0,
        "rounds": record.planned_rounds,
        "bits_per_byte": None if union is None else union.bits_per_byte,
        "total_tokens": record.total_tokens,
        "participants": people,
    }


def wait_for_run(folder: Path, say: Callable[[str], None]) -> None:
    """Until there is a run in a folder that has none yet; said once.

    Raises:
        RunFolderError: It holds runs, or is a file.
    """
    said = False
    while not (folder / "run.json").exists():
        if folder.is_file() or runs_in(folder):
            check_run(folder)
        if not said:
            say(f"waiting for a run in {folder}: there is none yet")
        said = True
        time.sleep(WATCH_SECONDS / 4)


def follow(look: Callable[[], Found], tell: Callable[[Found], None] | None) -> None:
    """Look again and again until the run ends.

    Args:
        tell: Told what is found whenever it changes; left out, it is shown on standard output.

    Raises:
        EngineError: From elsewhere: the server stayed away; the run may be over.
    """
    console, heard, before = results(), time.monotonic(), ""
    with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
        while True:
            try:
                found, heard = look(), time.monotonic()
            except EngineError:
                if time.monotonic() - heard > SILENCE_SECONDS:
                    raise
                time.sleep(WATCH_SECONDS)
                continue
            ended, now = found["state"] in ENDED, _headline(found)
            if tell is not None and now != before:
                tell(found)
            elif tell is None and (console.is_terminal or ended):
                live.update(shown(found), refresh=True)
            elif tell is None and now != before:
                console.print(now)
            if ended:
                return
            before = now
            time.sleep(WATCH_SECONDS)


def shown(found: Found) -> RenderableType:
    """What was found, for people."""
    if "runs" in found:
        return Group(
            f"{found['recipe']}: {found['state']}", *(f"  {n}: {_headline(r)}" for n, r in found["runs"].items())
        )
    names = (
        "participant",
        "presence",
        "task",
        "worked",
        "text",
        "device",
        "last answer",
        "loss",
        "held-out",
        "sent up",
    )
    rows = [(name, *_cells(facts)) for name, facts in found["participants"].items()]
    used = [place for place in range(len(names)) if not place or any(row[place] for row in rows)]
    made = table(*(names[place] for place in used))
    for row in rows:
        made.add_row(*(row[place] for place in used))
    notes = [f"the message server does not answer: {found['server']}"] if "server" in found else []
    if found["state"] == "stopped":
        notes.append(f"nobody is at work in it; {found['go_on']} goes on with it")
    return Group(_headline(found), *([made] if rows else []), *notes)


def _headline(found: Found) -> str:
    """A run in one line."""
    if "runs" in found:
        return f"{found['recipe']}: {found['state']}; " + "; ".join(map(_headline, found["runs"].values()))
    run = f" (run {found['run']})" if found.get("run") else ""
    parts = [f"{found['recipe']}{run}: {found['state']}"]
    if found["state"] == "waiting":
        parts[0] += " for participants"
    if found["round"] is not None:
        parts.append(f"round {found['round']} of {found['rounds']}")
    if found.get("bits_per_byte") is not None:
        parts.append(f"held-out {found['bits_per_byte']:.3f} bits/byte")
    if found.get("total_tokens"):
        parts.append(f"{count_text(found['total_tokens'])} tokens")
    return ", ".join(parts)


def _cells(facts: Found) -> list[str]:
    """A participant's row; what is not known is empty."""
    holding, last = facts.get("holding") or {}, facts.get("last") or {}
    loss, bits = last.get("loss"), facts.get("bits_per_byte")
    answer = f"{last['status']} in round {last['round']}" if last else ""
    why = f": {one_line(last['reason'], 80)}" if last.get("reason") else ""
    return [
        str(facts.get("presence", "")),
        str(facts.get("task", "")),
        f"{facts['worked_seconds']:.0f} s" if "worked_seconds" in facts else "",
        f"{holding['train_tokens']:,} tokens" if "train_tokens" in holding else "",
        str((facts.get("environment") or {}).get("device", "")),
        answer + why,
        "" if loss is None else f"{loss:.3f}",
        "" if bits is None else f"{bits:.3f}",
        bytes_text(facts["up_bytes"]) if facts.get("up_bytes") else "",
    ]
