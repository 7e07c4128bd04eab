"""What cheap communication costs in quality: data-parallel training beside the methods of few bytes.

Every case trains the same network from the same weights on the same text with as many tokens; what differs is who
computes what, and what travels. Data-parallel training is the pooled run: each step averages the gradients of a batch
from every participant, and its bytes are those of a ring all-reduce in fp32. Bytes are counted both ways, with
everything that travels before the first step, and once more with the steps behind the model that all cases go on from,
as if the participants had made it by data-parallel training.

Finished cases are kept in ``--keep FOLDER``, so that a long campaign may be cut and go on; ``--cases`` runs part of
it, ``--table`` only tells what is there. ``--preset 35m`` is the form for a GPU, ``--preset quick`` the full form in
small, ``--preset quick-random`` the same from random weights. ``--peers`` needs ``make peers``.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks import _measure
from benchmarks._measure import Measurement, measured
from benchmarks._parity_cases import (
    DATA_PARALLEL,
    DILOCO,
    METHODS,
    PRESETS,
    SIZES,
    STREAMING,
    Case,
    Outcome,
    Size,
    cases_of,
    recipe_of,
    run_case,
)
from potluck.recipe import recipe_hash
from potluck.recipe.outer import OuterSgd


def outcomes(size: Size, folder: Path, wanted: str, run: bool) -> list[Outcome]:
    """Of all cases: those that are kept, and those that are run now and kept."""
    found = []
    for case in cases_of(size):
        path = folder / f"{_name(case)}-{recipe_hash(recipe_of(size, case, folder))[:12]}.json"
        if path.exists():
            kept = json.loads(path.read_text())
            found.append(Outcome(**{**kept, "case": Case(**kept["case"])}))
        elif run and re.search(wanted, _name(case)):
            found.append(run_case(size, case, folder))
            path.write_text(json.dumps(asdict(found[-1])))
            print(f"{path.stem}: {found[-1].loss:.4f} nats per byte, {found[-1].seconds:.0f} s", file=sys.stderr)
    return found


def _name(case: Case) -> str:
    return f"{case.participants}-{case.split}-{re.sub('[^A-Za-z0-9.]+', '-', case.method)}-{case.seed}"


# --- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method in one setting over its seeds. Bytes are those that one participant sends and receives.

    Attributes:
        gaps: For each seed, loss over that of data-parallel training from the same weights, minus 1.
        whole: For each seed, bytes of the whole data-parallel run over those of the method's.
        savings: For each seed, bytes of data-parallel training when it first reaches its final loss + 1%, over those of
            the method when it does; ``None`` where it does not.
        warm_savings: The same, with the bytes of the model that both begin from on both sides.
    """

    participants: int
    split: str
    method: str
    losses: list[float]
    gaps: list[float]
    whole: list[float]
    savings: list[float | None]
    warm_savings: list[float | None]
    up_bytes: float
    down_bytes: float
    setup_bytes: float
    peak_share: float


def rows_of(found: Sequence[Outcome]) -> list[Row]:
    """The outcomes by setting and method, beside the data-parallel run of the same seed."""
    base = {(o.case.participants, o.case.split, o.case.seed): o for o in found if o.case.method == DATA_PARALLEL}
    settings = dict.fromkeys((o.case.participants, o.case.split, o.case.method) for o in found)
    rows = []
    for participants, split, method in settings:
        own = [o for o in found if (o.case.participants, o.case.split, o.case.method) == (participants, split, method)]
        beside = [(o, b) for o in own if (b := base.get((participants, split, o.case.seed))) is not None]
        if not beside:
            continue
        rows.append(
            Row(
                participants=participants,
                split=split,
                method=method,
                losses=[o.loss for o in own],
                gaps=[o.loss / b.loss - 1 for o, b in beside],
                whole=[b.total_bytes / o.total_bytes for o, b in beside],
                savings=[_saving(o, b) for o, b in beside],
                warm_savings=[_saving(o, b, b.warm_bytes) for o, b in beside],
                up_bytes=statistics.mean(o.up_bytes for o in own),
                down_bytes=statistics.mean(o.down_bytes for o in own),
                setup_bytes=statistics.mean(o.setup_bytes for o in own),
                peak_share=max(o.peak_bytes / (4 * o.parameters) for o in own),
            )
        )
    return rows


def _saving(outcome: Outcome, base: Outcome, before: int = 0) -> float | None:
    target = 1.01 * base.loss
    ours, theirs = outcome.bytes_to(target), base.bytes_to(target)
    return None if ours is None or theirs is None else (before + theirs) / (before + ours)


def markdown(rows: Sequence[Row]) -> str:
    """The table for people."""
    lines = [
        "| M | text | method | seeds | loss, nats per byte | over data-parallel | sent + received by one "
        "| of it set-up | fewer bytes, whole run | to +1%, from the warm model | to +1%, with the warm start |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.participants} | {row.split} | {row.method} | {len(row.losses)} | {_spread(row.losses, '{:.4f}')} "
            f"| {_spread([100 * gap for gap in row.gaps], '{:+.2f}')}% "
            f"| {row.up_bytes / 1e6:,.2f} + {row.down_bytes / 1e6:,.2f} MB | {row.setup_bytes / 1e6:,.2f} MB "
            f"| {_fewer(row.whole)} | {_fewer(row.savings)} | {_fewer(row.warm_savings)} |"
        )
    return "\n".join(lines)


def _fewer(savings: Sequence[float | None]) -> str:
    """Median and range of the seeds that come so far, and how many do."""
    reached = sorted(saving for saving in savings if saving is not None)
    if not reached:
        return f"- (0 of {len(savings)} reach it)"
    shown = [f"{saving:,.0f}" if saving >= 100 else f"{saving:.3g}" for saving in reached]
    text = f"{statistics.median(reached):,.0f}x" if reached[0] >= 100 else f"{statistics.median(reached):.3g}x"
    if shown[0] != shown[-1]:
        text += f" ({shown[0]} to {shown[-1]})"
    return text if len(reached) == len(savings) else f"{text} ({len(reached)} of {len(savings)} reach it)"


def _spread(values: Sequence[float], form: str) -> str:
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values)).lstrip('+')}" if len(values) > 1 else mean


# --- targets ---------------------------------------------------------------------------------------


def measure(size: Size) -> list[Measurement]:
    """All cases of a size, in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        return judged(outcomes(size, Path(folder), "", True), [])


def judged(found: Sequence[Outcome], peers: Sequence[Measurement]) -> list[Measurement]:
    """The outcomes as measurements; the claims of ``docs/results`` are judged at M = 4 where enough rounds were run."""
    rows = rows_of(found)
    claims = any(o.steps >= 500 and o.case.participants == 4 for o in found)
    results = []
    for row in rows:
        where = f"M = {row.participants}, {row.split}, {row.method}"
        gaps = [100 * gap for gap in row.gaps]
        if row.method != DATA_PARALLEL:
            results.append(measured(f"{where}: loss over data-parallel", gaps, "%"))
        for what, savings in (
            ("fewer bytes, whole run", row.whole),
            ("fewer bytes to data-parallel loss + 1%, from the warm model", row.savings),
            ("fewer bytes to data-parallel loss + 1%, with the warm start", row.warm_savings),
        ):
            results.append(measured(f"{where}: {what}", [saving for saving in savings if saving is not None], "x"))
    return [*results, *(_claims(found, rows) if claims else []), *peers]


def _claims(found: Sequence[Outcome], rows: Sequence[Row]) -> Iterator[Measurement]:
    four = {row.method: row for row in rows if (row.participants, row.split) == (4, "iid")}
    low = {method: row for method, row in four.items() if method != DATA_PARALLEL}
    if DILOCO not in low:
        return
    equal = [row for row in low.values() if METHODS[row.method].tokens == 1]
    best = min(equal, key=lambda row: statistics.mean(row.gaps))
    gaps = [100 * gap for gap in best.gaps]
    yield measured(
        f"best of few bytes at equal tokens ({best.method}): loss over data-parallel", gaps, "%", at_most=2.0
    )
    for kind, wanted, target in (("DiLoCo", False, 100), ("sparse or quantised", True, 1000)):
        savings = {
            method: statistics.median(kept)
            for method, row in low.items()
            if (kept := [saving for saving in row.savings if saving is not None]) and _compressed(method) == wanted
        }
        method = max(savings, key=lambda name: savings[name], default=None)
        runs = [saving for saving in low[method].savings if saving is not None] if method else []
        yield measured(f"fewest bytes, {kind} ({method})", runs, "x fewer than DDP", at_least=target)
    losses = {(o.case.method, o.case.seed): o.loss for o in found if (o.case.participants, o.case.split) == (4, "iid")}
    for method, beside, limit in (
        ("DiLoCo int8", DILOCO, 0.1),
        ("DiLoCo int4", DILOCO, 0.1),
        (STREAMING, DILOCO, 0.5),
    ):
        seeds = [seed for name, seed in losses if name == method and (beside, seed) in losses]
        ratios = [100 * (losses[method, seed] / losses[beside, seed] - 1) for seed in seeds]
        mean = [statistics.mean(ratios)] if ratios else []
        spread = f" (standard deviation {statistics.stdev(ratios):.3f}%)" if len(ratios) > 1 else ""
        yield measured(f"{method} over {beside}, mean of {len(ratios)} seeds{spread}", mean, "%", at_most=limit)
    if STREAMING in four:
        share = four[STREAMING].peak_share
        most = 1 / METHODS[STREAMING].fragments + 0.1
        yield measured(f"{STREAMING}: largest exchange", [share], "of all", at_most=most)


def _compressed(method: str) -> bool:
    return bool(METHODS[method].links)


def compared_with_peers(size: Size, found: Sequence[Outcome], folder: Path) -> list[Measurement]:
    """Torchft's DiLoCo, Flower's FedAvg and PyTorch's DDP do the first setting's seed 0 anew."""
    from benchmarks._parity_peers import PYTHON, run_peer

    participants, split, *_ = size.grid[0]
    if not PYTHON.exists():
        return [measured("peers", [], "", peer="not installed: make peers")]
    ours = {
        o.case.method: o for o in found if (o.case.participants, o.case.split, o.case.seed) == (participants, split, 0)
    }
    results = []
    for peer, method in (("torchft_diloco", DILOCO), ("flower_fedavg", "FedAvg"), ("ddp", DATA_PARALLEL)):
        case = Case(method=method, participants=participants, split=split, seed=0)
        recipe = recipe_of(size, case, folder)
        if method == DATA_PARALLEL:  # one step a round, each with all gradients
            recipe = recipe.model_copy(update={"outer": OuterSgd()})
        path = folder / f"peer-{peer}-{recipe_hash(recipe)[:12]}.json"
        if not path.exists():
            path.write_text(json.dumps(asdict(run_peer(peer, recipe))))
        theirs, own = json.loads(path.read_text()), ours[method]
        difference = [abs(100 * (own.loss / theirs["loss"] - 1))]
        sides = f"{peer}: {theirs['loss']:.4f}, ours {own.loss:.4f}"
        limit = 0.2 if peer == "torchft_diloco" else None
        results.append(measured(f"{method}: ours beside {peer}, loss", difference, "%", at_most=limit, peer=sides))
        sent = [theirs["up_bytes"] / own.up_bytes]
        results.append(
            measured(f"{method}: bytes {peer} sent, over ours", sent, "x", peer=f"{theirs['up_bytes']:,.0f} B")
        )
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for, print the table and the judgements."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    length = parser.add_mutually_exclusive_group()
    for name in SIZES:
        length.add_argument(f"--{name}", dest="size", action="store_const", const=name)
    length.add_argument(
        "--preset",
        dest="size",
        choices=PRESETS,
        help="a form for a GPU (35m), or the full form in small, from a model or from random weights",
    )
    parser.add_argument("--keep", type=Path, default=Path("runs/parity"), help="folder of finished cases")
    parser.add_argument("--cases", default="", help="run only cases in whose name this pattern is found")
    parser.add_argument("--text", type=Path, help="documents to train on, JSON lines with `text` and `group`")
    parser.add_argument("--table", action="store_true", help="run nothing, tell what is kept")
    parser.add_argument("--peers", action="store_true", help="also run the peers (`make peers`)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    size = {**SIZES, **PRESETS}[options.size or "short"]
    folder = options.keep / (options.size or "short")
    folder.mkdir(parents=True, exist_ok=True)
    if options.text:
        size = replace(size, text=str(options.text.absolute()))
    found = outcomes(size, folder, options.cases, not options.table)
    results = judged(found, compared_with_peers(size, found, folder) if options.peers else [])
    print(markdown(rows_of(found)), _measure.table(results), sep="\n\n")
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    sys.exit(any(result.holds is False for result in results))


if __name__ == "__main__":
    main()
