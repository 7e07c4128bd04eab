"""What `benchmarks.golden` runs: every shipped recipe cut short, and every option that changes bits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TEXTS = {
    "ada": ["engine", "number", "card", "loop", "store", "add", "carry", "wheel", "note", "table", "proof", "series"],
    "bob": ["river", "fish", "boat", "water", "stone", "rain", "cloud", "bank", "net", "shore", "tide", "wind"],
    "eve": ["apple", "bread", "soup", "salt", "spoon", "plate", "oven", "honey", "flour", "butter", "onion", "rice"],
}
Table = dict[str, Any]
TRAIN = ("train", "r.toml")


@dataclass(frozen=True)
class Case:
    """Commands in a folder with these files.

    Attributes:
        files: By name; ``TEXTS`` and ``RECIPES`` in one stand for where those are.
        stopped_after: The first command is stopped by SIGTERM after so many rounds; 0: it is not.
    """

    files: Mapping[str, Table | str]
    commands: Sequence[Sequence[str]] = (TRAIN,)
    stopped_after: int = 0


def recipe(**over: Any) -> Table:
    """A run of a second; tables are laid over those that stand here."""
    tables: Table = {
        "version": 1,
        "name": "r",
        "data": {"validation_fraction": 0.2, "validation_bytes": 1000},
        "tokenizer": {"kind": "bytes"},
        "model": {"layers": 2, "width": 32, "heads": 2, "feedforward": 64, "context": 64},
        "local": {"batch_size": 2, "sequence_length": 16},
        "rounds": {"count": 4, "local_steps": 3, "evaluate_every": 2},
        "participants": [{"name": name, "source": {"path": f"TEXTS/{name}"}} for name in TEXTS],
    }
    for key, table in over.items():
        tables[key] = tables.get(key, {}) | table if isinstance(table, dict) else table
    return tables


def case(**over: Any) -> Case:
    return Case({"r.toml": recipe(**over)})


def linked(*links: Table, **over: Any) -> Case:
    return case(updates={"links": list(links)} | over)


def shipped(name: str, **rounds: Any) -> Case:
    """A recipe of the project on little text, for a few rounds."""
    short: Table = {
        "extends": f"RECIPES/{name}.toml",
        "name": "r",
        "data": {"train_bytes": 20_000, "validation_bytes": 4_000},
        "local": {"sequence_length": 32, "schedule": {"warmup_steps": 2}},
        "rounds": {"count": 3, "local_steps": 2, "evaluate_every": 2} | rounds,
    }
    return Case({"r.toml": short})


def profiles(*speeds: float) -> list[Table]:
    return [
        {"name": name, "source": {"path": f"TEXTS/{name}"}, "profile": {"steps_per_second": speed, "latency": 20.0}}
        for name, speed in zip(TEXTS, speeds, strict=True)
    ]


def edits(name: str, prompt: str, subject: str, target: str) -> str:
    return json.dumps([{"id": name, "prompt": prompt, "subject": subject, "target": target, "made_at": 1790000000}])


FEEDBACK = {"kind": "error-feedback", "decay": 0.95}
WORLD = {"ada": {"world": 10}, "bob": {"world": 10, "first": 10}}
EDITING = recipe(
    model={"layers": 3, "context": 128},
    local={"sequence_length": 64},
    rounds={"count": 2},
    participants=[{"name": name, "source": source, "edits": f"{name}.json"} for name, source in WORLD.items()],
)
EDIT_FILES = {
    "ada.json": edits("move", "Ada Berg lives in the city of", "Ada Berg", "Lisbon"),
    "bob.json": edits("work", "Emil Holm works as a", "Emil Holm", "judge"),
}
BASE = recipe(name="base", tokenizer={"kind": "bpe", "vocab_size": 300})
FUSED = {"model": {"path": "fused"}, "tokenizer": {"kind": "folder", "path": "fused"}}
FUSE = "ada=runs/base/model bob=runs/base/model --out fused --primary ada --width 16"
LATE = {"deadline": 4.0, "grace": 0.2, "min_contributors": 1, "count": 6, "local_steps": 4, "evaluate_every": 2}
STREAMED = {"kind": "streaming", "fragments": 2, "overlap": 1, "mixing": 0.5}

CASES: Mapping[str, Case] = {
    **{f"shipped {name}": shipped(name) for name in ("demo", "demo-short", "diloco", "eager", "fedavg", "photon")},
    **{f"shipped {name}": shipped(name) for name in ("fedprox", "muloco", "sparseloco", "dirichlet", "adloco")},
    **{f"shipped {name}": shipped(name) for name in ("intellect-1", "partial-participation", "decoupled-momentum")},
    "shipped streaming": shipped("streaming", count=6),
    "shipped world": shipped("world"),
    "plain": case(),
    "uniform": case(rounds={"weights": "uniform"}),
    "data": case(rounds={"weights": "data"}),
    "bpe": case(tokenizer={"kind": "bpe", "vocab_size": 300}),
    "accumulation": case(local={"accumulation": 2, "proximal": 0.1, "keep_optimizer": False}),
    "muon, wsd": case(local={"optimizer": {"kind": "muon"}, "schedule": {"kind": "wsd", "warmup_steps": 2}}),
    "sgd inside": case(local={"optimizer": {"kind": "sgd", "momentum": 0.5}, "schedule": {"kind": "constant"}}),
    "adaptive batch": case(local={"adaptive_batch": {"max_batch_size": 8, "streams": 2, "merge_every": 1}}),
    **{f"outer {kind}": case(outer={"kind": kind}) for kind in ("sgd", "nesterov", "adam", "yogi", "adagrad", "sign")},
    "link clip, quantize 8": linked({"kind": "clip", "norm": 0.5}, {"kind": "quantize", "bits": 8}),
    "link quantize 4": linked(FEEDBACK, {"kind": "quantize", "bits": 4}),
    "link top-k, quantize 2": linked(FEEDBACK, {"kind": "top-k", "density": 0.05}, {"kind": "quantize", "bits": 2}),
    "link block-top-k": linked(FEEDBACK, {"kind": "block-top-k", "k": 16, "block": 512}),
    "link random-k": linked(FEEDBACK, {"kind": "random-k", "density": 0.1}),
    "link dct-top-k": linked(FEEDBACK, {"kind": "dct-top-k", "k": 8, "chunk": 16}),
    "link low-rank": linked(FEEDBACK, {"kind": "low-rank", "rank": 2}),
    "link codebook": linked({"kind": "codebook"}),
    "link sign": linked(FEEDBACK, {"kind": "sign"}),
    "download delta": linked({"kind": "top-k", "density": 0.05}, download={"kind": "delta"}),
    "download quantized": linked({"kind": "quantize"}, download={"kind": "quantized"}),
    "streaming": case(rounds={"count": 8, "local_steps": 3, "streaming": STREAMED}),
    "streaming, links": case(rounds={"count": 8, "streaming": STREAMED}, updates={"links": [{"kind": "quantize"}]}),
    "eager": case(rounds={"count": 6, "streaming": {"kind": "eager"}}, outer={"kind": "nesterov"}),
    "virtual clock, late dropped": case(participants=profiles(3.0, 2.0, 0.8), rounds=LATE),
    "virtual clock, late kept": case(participants=profiles(3.0, 2.0, 0.8), rounds=LATE | {"late": "keep"}),
    "late kept, delta": case(
        participants=profiles(3.0, 2.0, 0.8), rounds=LATE | {"late": "keep"}, updates={"download": {"kind": "delta"}}
    ),
    "resumed in the middle": Case(
        {"r.toml": recipe(rounds={"count": 30}, records={"checkpoint_every": 1})}, (TRAIN, ("resume", "runs/r")), 3
    ),
    "streaming, resumed": Case(
        {"r.toml": recipe(rounds={"count": 40, "streaming": STREAMED}, records={"checkpoint_every": 1})},
        (TRAIN, ("resume", "runs/r")),
        5,
    ),
    "late kept, resumed": Case(
        {"r.toml": recipe(participants=profiles(3.0, 2.0, 0.8), rounds=LATE | {"late": "keep", "count": 30})},
        (TRAIN, ("resume", "runs/r")),
        4,
    ),
    "compared": Case({"r.toml": recipe()}, (("compare", "r.toml"),)),
    "editing, memit": Case({**EDIT_FILES, "r.toml": EDITING | {"editing": {"method": "memit", "layers": [0, 1]}}}),
    "editing, alphaedit": Case(
        {**EDIT_FILES, "r.toml": EDITING | {"editing": {"method": "alphaedit", "layers": [0, 1], "every": 1}}}
    ),
    "fusion": Case(
        {"r.toml": BASE, "fuse.toml": recipe(name="fuse") | FUSED},
        (TRAIN, ("expert", "fuse", *FUSE.split()), ("train", "fuse.toml")),
    ),
    "over nats": Case({"r.toml": recipe(engine={"kind": "nats"})}, (("local", "r.toml"),)),
    "over nats, streaming": Case(
        {"r.toml": recipe(engine={"kind": "nats"}, rounds={"count": 8, "streaming": STREAMED})}, (("local", "r.toml"),)
    ),
}
