"""Ten participants' parts, composed in every way there is: held-out loss on everybody's text, at equal tokens.

Beside the common form, ``python -m benchmarks.compose --part PART --seed N --device D --rows FILE`` measures one
part of one seed, so that several can run at once; ``--read FILE…`` prints the tables of what they wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev

from benchmarks import _measure
from benchmarks._compose_experts import ISOLATED, JOINT, LEFT, full_experts, low_rank_experts
from benchmarks._compose_merges import Row, merges
from benchmarks._compose_parts import FULL, Size, adapters
from benchmarks._compose_routed import joint, ranks, references, routed, x_lora
from benchmarks._measure import Measurement, measured
from benchmarks._silos import BaseSize, Stage, stage
from potluck.compose.merging.fisher import Fisher
from potluck.compose.merging.regmean import RegMean
from potluck.compose.statistics import fisher_statistics, gram_statistics

SIZES = {
    "short": replace(
        FULL,
        base=BaseSize(
            vocabulary=1024, layers=2, width=64, heads=2, feedforward=128, steps=40, local_steps=20, parties=4
        ),
        seeds=(0,),
        max_steps=20,
        router_steps=20,
        held_out=1_025,
    ),
    "full": FULL,
}  # fmt: skip
_MEASURED = 16_385  # tokens behind a participant's statistics
Rows = dict[str, list[dict[str, float]]]  # of each method, the losses of each seed


def merged_part(place: Stage, size: Size, seed: int) -> Iterator[Row]:
    """One adapter out of all, of equal rank."""
    mine = adapters(place, size, (size.rank,), seed)
    yield from references(place, mine, size, f"rank {size.rank}")
    found = {
        RegMean: [gram_statistics(place.base, a, place.own[n][:_MEASURED], size.length) for n, a in mine.items()],
        Fisher: [fisher_statistics(place.base, a, place.own[n][:_MEASURED], size.length) for n, a in mine.items()],
    }
    yield from merges(place, mine, found, size.rank, size.length, size.device)
    yield joint(place, size, size.rank, seed)


def routed_part(place: Stage, size: Size, seed: int) -> Iterator[Row]:
    """All adapters at once, of mixed ranks, and whose turn it is found out."""
    mixed = adapters(place, size, size.ranks, seed)
    yield from references(place, mixed, size, "mixed ranks")
    yield from routed(place, adapters(place, size, (size.rank,), seed), size, f"rank {size.rank}")
    yield from routed(place, mixed, size, "mixed ranks")
    yield from ranks(place, mixed, size, seed)
    yield x_lora(place, adapters(place, size, (size.rank,), seed), size, seed)


PARTS: Mapping[str, Callable[[Stage, Size, int], Iterator[Row]]] = {
    "merges": merged_part,
    "routed": routed_part,
    "experts": low_rank_experts,
    "full-experts": full_experts,
}


def rows_of(part: str, size: Size, seed: int) -> Iterator[Row]:
    """One part of one seed."""
    place = stage(seed, size.base, size.device)
    if size.held_out:
        place = replace(place, held_out={name: tokens[: size.held_out] for name, tokens in place.held_out.items()})
    for row in PARTS[part](place, size, seed):
        print(f"{part} {seed}: {row.method:50} {row.mean:.4f}  {row.setting}", file=sys.stderr, flush=True)
        yield row


def measure(size: Size) -> list[Measurement]:
    """All parts of all seeds, judged."""
    rows: Rows = {}
    for seed in size.seeds:
        for part in PARTS:
            for row in rows_of(part, size, seed):
                rows.setdefault(row.method, []).append(row.losses)
    return judged(rows, size)


def judged(rows: Rows, size: Size) -> list[Measurement]:
    """What the table is for."""
    found = [measured(f"held-out loss: {name}", _means(rows[name]), "nats/token") for name in rows if LEFT not in name]
    return found + [
        figure
        for needed, judge in (("PEFT svd", _merging), ("potluck Arrow, mixed ranks", _routing), (JOINT, _experts))
        if any(name.startswith(needed) for name in rows)
        for figure in judge(rows, size)
    ]


def _merging(rows: Rows, size: Size) -> Iterator[Measurement]:
    rank = f"rank {size.rank}"
    ours = min((n for n in rows if n.startswith("potluck ") and _is_merge(n)), key=lambda n: mean(_means(rows[n])))
    peft = min((n for n in rows if n.startswith("PEFT ") and "X-LoRA" not in n), key=lambda n: mean(_means(rows[n])))
    difference = [a - b for a, b in zip(_means(rows[ours]), _means(rows[peft]), strict=True)]
    yield measured(f"best merge at {rank}: {ours}, against {peft}", difference, "nats", at_most=0.0, peer=peft)
    lego = [a - b for a, b in zip(_means(rows["potluck lego"]), _means(rows["potluck svd"]), strict=True)]
    yield measured(f"LEGO against truncated SVD at {rank}", lego, "nats", peer="potluck svd")


def _routing(rows: Rows, size: Size) -> Iterator[Measurement]:
    for name in ("potluck Arrow, mixed ranks", "potluck evidence, mixed ranks"):
        three = zip(_means(rows["base"]), _means(rows[name]), _means(rows["own adapter, mixed ranks"]), strict=False)
        gains = [(base - loss) / (base - best) for base, loss, best in three]
        bar = 0.8 if "evidence" in name else None
        yield measured(f"own adapter's gain recovered: {name}", gains, "share", at_least=bar)


def _experts(rows: Rows, size: Size) -> Iterator[Measurement]:
    for label in [label for label in ("mixed ranks", "full size") if f"{JOINT}, {label}" in rows]:
        apart, together = rows[f"{ISOLATED}, {label}, isolated"], rows[f"{JOINT}, {label}"]
        above = [100 * (a / b - 1) for a, b in zip(_means(apart), _means(together), strict=True)]
        bar = 3.0 if label == "mixed ranks" else None
        yield measured(f"isolated experts above the joint mixture, {label}", above, "%", at_most=bar)
        gone = [max(of_seed.values()) for of_seed in rows[f"{LEFT}, {label}"]]
        yield measured(f"{LEFT}, {label}", gone, "logits", at_most=0.0)


def _is_merge(name: str) -> bool:
    return not any(word in name for word in (",", "potluck sum", "expert", "rank-wise"))


def _means(losses: Sequence[Mapping[str, float]]) -> list[float]:
    return [mean(of_seed.values()) for of_seed in losses]


def table(rows: Rows) -> str:
    """Losses of each method on each participant's held-out text, mean over seeds, and the mean's spread."""
    names = list(next(iter(rows.values()))[0])
    lines = [f"| method | {' | '.join(names)} | mean ± sd |", "|---" * (len(names) + 2) + "|"]
    for method, seeds in rows.items():
        if LEFT in method:
            continue
        cells = (f"{mean(of_seed[name] for of_seed in seeds):.3f}" for name in names)
        means = _means(seeds)
        spread = f" ± {stdev(means):.3f}" if len(means) > 1 else ""
        lines.append(f"| {method} | {' | '.join(cells)} | {mean(means):.4f}{spread} |")
    return "\n".join(lines)


def _one_part(options: argparse.Namespace) -> None:
    given = SIZES[options.size]
    epochs, held_out = options.epochs or given.epochs, options.held_out or given.held_out
    size = replace(given, device=options.device, epochs=epochs, held_out=held_out)
    with options.rows.open("w") as file:
        for row in rows_of(options.part, size, options.seed):
            file.write(json.dumps({"seed": options.seed, "part": options.part, **asdict(row)}) + "\n")
            file.flush()


def _read(paths: Sequence[Path], size: Size) -> None:
    rows: Rows = {}
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(row["method"], []).append(row["losses"])
    print(table(rows))
    print(_measure.table(judged(rows, size)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--part", choices=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--held-out", type=int)
    parser.add_argument("--read", type=Path, nargs="+")
    chosen, others = parser.parse_known_args()
    if chosen.part:
        _one_part(chosen)
    elif chosen.read:
        _read(chosen.read, SIZES[chosen.size])
    else:
        _measure.main(measure, SIZES, others)
