"""The report as one HTML page: no script, no network; everything from outside is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from potluck.records.curves import SummaryRow, lowest
from potluck.records.units import bytes_text, count_text, duration_text, one_line

_CSS = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #e1e4e8; --page: #fcfcfd; --card: #ffffff;
  --good: #18794e; --bad: #c62a2f; --accent: #0b86d0; --shade: #0003; }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --soft: #b0b4ba; --line: #33373d; --page: #111214;
  --card: #191b1e; --good: #4cc38a; --bad: #ff8b8b; --accent: #52a9ff; --shade: #fff4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .1rem 0 .75rem; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .6rem; }
.kind { color: var(--accent); font-weight: 600; font-size: .85rem; }
.headline { font-size: 1.15rem; max-width: 48rem; margin: 0 0 1.5rem; }
.note, caption { color: var(--soft); font-size: .875rem; max-width: 48rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .65rem .9rem; }
.facts dt { color: var(--soft); font-size: .8rem; } .facts dd { margin: 0; font-size: 1.2rem; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; background:
  linear-gradient(90deg, var(--page) 40%, transparent) left / 3rem 100% local no-repeat,
  linear-gradient(-90deg, var(--page) 40%, transparent) right / 3rem 100% local no-repeat,
  linear-gradient(90deg, var(--shade), transparent) left / .8rem 100% no-repeat,
  linear-gradient(-90deg, var(--shade), transparent) right / .8rem 100% no-repeat; }
.hint, .chart.narrow { display: none; }
caption { text-align: left; padding-bottom: .3rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
thead th { color: var(--soft); font-weight: 500; font-size: .82rem; } tbody th { font-weight: inherit; }
th, td { text-align: right; padding: .38rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { padding-left: 0; }
.left { text-align: left; } .wrap { white-space: normal; overflow-wrap: anywhere; min-width: 11rem; }
tr.all > * { border-top: 2px solid var(--line); } .best { font-weight: 700; }
.good { color: var(--good); } .bad { color: var(--bad); } .soft { color: var(--soft); font-weight: 400; }
.chart { width: 100%; height: auto; display: block; } .chart text { font-family: inherit; }
.split { display: flex; height: .8rem; border-radius: .4rem; overflow: hidden; margin: .5rem 0;
  background: var(--line); }
.split span { display: block; } .key { display: inline-block; width: .7rem; height: .7rem; border-radius: .2rem;
  margin: 0 .35rem 0 0; } .key ~ .key { margin-left: 1.1rem; }
details { border: 1px solid var(--line); border-radius: .6rem; background: var(--card);
  padding: .6rem .9rem; margin: .75rem 0; }
summary { cursor: pointer; font-weight: 600; } pre, code { font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, monospace; }
pre { overflow-x: auto; margin: .75rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: 1.25rem 1rem 3rem; } .chart.broad { display: none; }
  .hint, .chart.narrow { display: block; } th:first-child { position: sticky; left: 0; background: var(--page);
    min-width: 6.5rem; white-space: normal; overflow-wrap: anywhere; } .facts { gap: .5rem; } }
@media print { body { max-width: none; padding: 0; background: none; font-size: 12px; }
  details, .facts div { break-inside: avoid; }
  h2 { break-after: avoid; } svg, table { break-inside: avoid; } }
"""
_SPLIT = (
    ("local_steps", "local steps", "#0b86d0"),
    ("evaluation", "evaluation", "#e69f00"),
    ("other", "other", "#8c8c8c"),
)
_HINT = '<p class="note hint">Wider than this screen: scroll it sideways.</p>'
_FITS = 4  # columns that a phone shows
Cell = tuple[str, str]  # HTML and CSS classes
Chart = tuple[str, str]  # SVG for a wide screen, and for a phone


def run_page(data: Mapping[str, Any], charts: Mapping[str, Chart]) -> str:
    """The page of one run, from the content of ``report.json``."""
    facts = {
        "parameters": count_text(data["parameters"]),
        "rounds": f"{data['rounds']} of {data['planned_rounds']}",
        "tokens trained": count_text(data["total_tokens"]),
        **_traffic(data),
        "evaluated": _evaluated(data["evaluations"]),
        "time": duration_text(data["seconds"]["total"]),
    }
    sections = [
        _facts(facts),
        _chart("Held-out text", charts.get("held_out"), "Bits per byte after each evaluation; lower is better."),
        _chart("Training loss", charts.get("loss"), "Mean over the local steps of each round."),
        _participants(data),
        _trouble(data["trouble"]),
        _time(data["seconds"]),
        _provenance(data, data),
    ]
    return _page(str(data["name"]), f"potluck run · {data['variant']}", data["headline"], sections)


def _evaluated(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """How often, and on how much text."""
    tokens = next((item["union"]["tokens"] for item in reversed(evaluations) if item["union"]), 0)
    return f"{len(evaluations)} times on {count_text(tokens)} tokens" if tokens else "not"


def comparison_page(data: Mapping[str, Any], charts: Mapping[str, Chart]) -> str:
    """The page of a comparison, from the content of ``report.json``."""
    together, pooled = data["together"], data["pooled"]
    runs = [together, *data["alone"].values(), *([pooled] if pooled else [])]
    facts = {
        "parameters": count_text(together["parameters"]),
        "rounds": f"{together['rounds']} of {together['planned_rounds']}",
        "tokens together": count_text(together["total_tokens"]),
        "bytes together": bytes_text(together["up_bytes"] + together["down_bytes"]),
        "runs": str(len(runs)),
        "time, all runs": duration_text(sum(run["seconds"]["total"] for run in runs)),
    }
    sections = [
        _summary(data["summary"]),
        _facts(facts),
        _chart("Everyone's held-out text", charts.get("union"), _tokens_note(data["summary"]["tokens"])),
        _chart(
            "Each participant's held-out text",
            charts.get("participants"),
            "Bits per byte on one scale; a long run's steep beginning is left out.",
        ),
        _chart("Training loss", charts.get("loss"), "Mean over the participants who train in each run."),
        _participants(together, "Participants of the run together"),
        _trouble([item for run in runs for item in run["trouble"]]),
        _time(together["seconds"], "Time of the run together"),
        _provenance(data, together),
    ]
    return _page(str(data["name"]), "potluck comparison · together, alone, pooled", data["headline"], sections)


def _page(name: str, kind: str, headline: str, sections: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)} · potluck</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<header>\n"
        f'<div class="kind">{escape(kind)}</div>\n<h1>{escape(name)}</h1>\n'
        f'<p class="headline">{escape(headline)}</p>\n</header>\n<main>\n'
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _facts(facts: Mapping[str, str]) -> str:
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _traffic(data: Mapping[str, Any]) -> dict[str, str]:
    """Bytes sent, of a run in which something travels."""
    ways = {"sent up": data["up_bytes"], "sent down": data["down_bytes"]}
    return {way: bytes_text(size) for way, size in ways.items() if size is not None} or {"sent": "nothing: it is alone"}


def _chart(title: str, drawn: Chart | None, note: str) -> str:
    if drawn is None:
        return ""
    both = "\n".join(
        svg.replace('class="chart"', f'class="chart {size}" role="img" aria-label="{escape(title)}"', 1)
        for svg, size in zip(drawn, ("broad", "narrow"), strict=True)
    )
    return f'<section><h2>{escape(title)}</h2>\n<p class="note">{escape(note)}</p>\n{both}</section>'


def _summary(summary: Mapping[str, Any]) -> str:
    pooled = summary["union"]["pooled"] is not None
    head: list[Cell] = [("held-out text of", "left"), ("own model alone", ""), ("together", ""), ("change", "")]
    head += [("pooled", "")] if pooled else []
    head += [("best alone", ""), ("trained by", "left")]
    rows = [_summary_cells(row, row["alone"], pooled) for row in summary["rows"]]
    total = _summary_cells(summary["union"], summary["union"]["best_alone"], pooled)
    everyone = len(summary["union_of"]) == len(summary["rows"])
    whose = "everyone's text" if everyone else f"the text of {', '.join(summary['union_of']) or 'nobody'}"
    note = f"The best of each row is bold. The last row is {whose}; its change is against the best alone."
    note += " Pooled is one model on all text in one place, a yardstick." if pooled else ""
    table = _table("Bits per byte on held-out text; lower is better.", head, rows, total)
    return f'<section>{table}\n<p class="note">{escape(note)}</p></section>'


def _summary_cells(row: SummaryRow, rival: float | None, pooled: bool) -> list[Cell]:
    together = row["together"]
    change: Cell = ("", "")
    if together is not None and rival:
        change = (f"{100 * (together / rival - 1):+.1f}%", "good" if together < rival else "bad")
    best = lowest(row)
    alone, shared, all_text, rivals = (
        (_bits(value), "best" if _bits(value) == best else "")
        for value in (row["alone"], together, row["pooled"], row["best_alone"])
    )
    name = (escape("everyone" if row["text"] == "union" else row["text"]), "left")
    by = (escape(row["best_alone_by"] or ""), "left soft")
    return [name, alone, shared, change, *([all_text] if pooled else []), rivals, by]


def _participants(data: Mapping[str, Any], title: str = "Participants") -> str:
    people = data["participants"]
    travels = data["up_bytes"] is not None
    columns = ["documents", "text", "tokens", "ok", "failed", "rejected", "trained tokens", "epochs"]
    columns += [*(["up", "down"] if travels else []), "bits/byte"]
    head: list[Cell] = [("participant", "left"), *((column, "") for column in columns)]
    rows = [
        [
            (escape(item["name"]), "left"),
            (_count(item.get("train_documents")), ""),
            ("-" if item.get("train_bytes") is None else bytes_text(item["train_bytes"]), ""),
            (_count(item.get("train_tokens")), ""),
            (str(item["ok"]), ""),
            (str(item["failed"]), "bad" if item["failed"] else "soft"),
            (str(item["rejected"]), "bad" if item["rejected"] else "soft"),
            (count_text(item["trained_tokens"]), ""),
            (f"{item['epochs']:.3g}", ""),
            *([(bytes_text(item["up_bytes"]), ""), (bytes_text(item["down_bytes"]), "")] if travels else []),
            (_bits(item["bits_per_byte"]), ""),
        ]
        for item in people
    ]
    note = "Documents, text and tokens are what each holds to train on; ok, failed and rejected count contributions."
    note += "" if travels else " Nothing was sent: it trained in one place."
    table = _table("What each holds, did, and came to.", head, rows)
    return f'<section><h2>{escape(title)}</h2>\n{table}\n<p class="note">{escape(note)}</p></section>'


def _trouble(trouble: Sequence[Mapping[str, Any]]) -> str:
    if not trouble:
        return ""
    shown = trouble[:100]
    head: list[Cell] = [("round", "left"), ("participant", "left"), ("status", "left"), ("reason", "left")]
    rows: list[list[Cell]] = [
        [
            (str(item["round"]), "left"),
            (escape(item["participant"]), "left"),
            (escape(item["status"]), "left bad"),
            (escape(one_line(item["reason"] or "", 500)), "left wrap"),
        ]
        for item in shown
    ]
    more = f'<p class="note">{len(trouble) - len(shown)} more in events.jsonl.</p>' if len(shown) < len(trouble) else ""
    table = _table("Contributions and evaluations that failed, and why.", head, rows)
    return f"<section><h2>What did not count</h2>\n{table}{more}</section>"


def _time(seconds: Mapping[str, float], title: str = "Time") -> str:
    whole = sum(seconds[key] for key, _, _ in _SPLIT)
    if not whole:
        return ""
    bar = "".join(
        f'<span style="width:{100 * seconds[key] / whole:.2f}%;background:{colour}"></span>'
        for key, _, colour in _SPLIT
    )
    words = "".join(
        f'<span class="key" style="background:{colour}"></span>{name} {duration_text(seconds[key])} '
        f"({100 * seconds[key] / whole:.0f}%)"
        for key, name, colour in _SPLIT
    )
    return f'<section><h2>{escape(title)}</h2>\n<div class="split">{bar}</div><div class="note">{words}</div></section>'


def _provenance(data: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    facts = {
        "potluck": run["potluck"],
        **run["environment"],
        "started": run["time"],
        "resumed": f"{run['resumed']} times",
        "recipe hash": run["recipe_hash"],
        "state hash": run["state_hash"] or "not finished",
    }
    rows: list[list[Cell]] = [
        [(escape(str(key)), "left soft"), (escape(one_line(str(value))), "left wrap")] for key, value in facts.items()
    ]
    recipe = f"<details><summary>recipe.toml</summary><pre>{escape(data['recipe'])}</pre></details>"
    return (
        f"<section><h2>How it was made</h2>\n<p><code>{escape(data['command'])}</code></p>\n"
        f"{recipe if data['recipe'] else ''}<details><summary>Versions and hashes</summary>"
        f"{_table('Of the run and of the machine it ran on.', [], rows)}</details></section>"
    )


def _table(caption: str, head: Sequence[Cell], rows: Sequence[Sequence[Cell]], total: Sequence[Cell] = ()) -> str:
    """A table that scrolls by itself, by keyboard too; the first cell of a row names it."""

    def cell(tag: str, content: Cell) -> str:
        text, classes = content
        return f'<{tag} class="{classes}">{text}</{tag[:2]}>' if classes else f"<{tag}>{text}</{tag[:2]}>"

    def line(cells: Sequence[Cell]) -> str:
        return cell('th scope="row"', cells[0]) + "".join(cell("td", content) for content in cells[1:])

    columns = "".join(cell('th scope="col"', content) for content in head)
    top = f"<thead><tr>{columns}</tr></thead>" if head else ""
    body = "".join(f"<tr>{line(row)}</tr>\n" for row in rows)
    last = f'<tr class="all">{line(total)}</tr>' if total else ""
    return (
        f"{_HINT if len(head) > _FITS else ''}"
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>{escape(caption)}'
        f"</caption>{top}<tbody>{body}{last}</tbody></table></div>"
    )


def _tokens_note(tokens: Mapping[str, Any]) -> str:
    alone = sorted(tokens["alone"].values())
    each = "" if not alone else f", each alone {count_text(alone[0])}"
    if alone and count_text(alone[0]) != count_text(alone[-1]):
        each += f" to {count_text(alone[-1])}"
    pooled = "" if tokens["pooled"] is None else f", pooled {count_text(tokens['pooled'])}"
    together = count_text(tokens["together"])
    return f"Bits per byte, lower is better. Tokens of the runs: together {together}{each}{pooled}."


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
