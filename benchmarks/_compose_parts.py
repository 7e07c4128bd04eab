"""What everybody brings to `benchmarks.compose`: the base and each participant's adapters, trained once and kept.

``python -m benchmarks._compose_parts SEED DEVICE`` trains those of one seed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks._silos import BaseSize, Stage, stage
from potluck.compose.adapter import Adapter, load_adapter, save_adapter
from potluck.compose.lora import train_adapter
from potluck.compose.training import Lesson
from potluck.recipe.seeds import seed_of


@dataclass(frozen=True, kw_only=True)
class Size:
    """One form of the benchmark.

    Attributes:
        epochs: Passes over a participant's own text in training its part; texts differ tenfold in size.
        max_steps: And no more steps than this.
        rank: Of what is merged and of the result.
        ranks: Of the adapters that are routed, in turn.
        router_steps: Of whatever learns on the public text.
        top_k: Experts of a token, beside the anchor.
        held_out: Tokens of each participant's held-out text; all of it if 0.
    """

    base: BaseSize
    seeds: tuple[int, ...]
    epochs: float = 4.0
    max_steps: int = 300
    batch_size: int = 8
    length: int = 128
    learning_rate: float = 3e-3
    rank: int = 8
    ranks: tuple[int, ...] = (4, 8, 16)
    router_steps: int = 200
    top_k: int = 4
    held_out: int = 0
    device: str = "cpu"

    def lesson(self, tokens: int, seed: int) -> Lesson:
        """How a part is trained on so much text."""
        steps = int(min(self.max_steps, max(2, self.epochs * tokens / (self.batch_size * self.length))))
        return Lesson(steps, self.batch_size, self.length, self.learning_rate, seed, self.device)


FULL = Size(
    base=BaseSize(
        vocabulary=4096, layers=4, width=192, heads=6, feedforward=512, steps=600, local_steps=50, batch_size=8
    ),
    seeds=(0, 1, 2),
)


def adapters(place: Stage, size: Size, ranks: tuple[int, ...], seed: int) -> dict[str, Adapter]:
    """Each participant's adapter, of these ranks in turn; those that were trained before are read."""
    folder = Path(place.base.place).parent / f"adapters-{'-'.join(map(str, ranks))}"
    made = {}
    for number, (name, own) in enumerate(place.own.items()):
        kept = folder / name
        if not (kept / "adapter_config.json").exists():
            lesson = size.lesson(len(own), seed_of(seed, "adapter", name))
            save_adapter(train_adapter(place.base, [own], lesson, ranks[number % len(ranks)]), kept)
        made[name] = load_adapter(kept)
    return made


if __name__ == "__main__":
    import dataclasses
    import time

    from benchmarks._compose_merges import losses
    from potluck.compose.lora import attached

    seed, device = int(sys.argv[1]), sys.argv[2]
    size = dataclasses.replace(FULL, device=device)
    began = time.monotonic()
    place = stage(seed, size.base, device)
    print(f"base {time.monotonic() - began:.0f} s", flush=True)
    before = losses(place, place.held_out, size.length, device)
    for ranks in ((size.rank,), size.ranks):
        began = time.monotonic()
        made = adapters(place, size, ranks, seed)
        print(f"adapters {ranks} {time.monotonic() - began:.0f} s", flush=True)
        for name, adapter in made.items():
            with attached(place.base.model, adapter):
                after = losses(place, {name: place.held_out[name]}, size.length, device)
            print(f"{name:12} {len(place.own[name]):7} {before[name]:.4f} {after[name]:.4f}", flush=True)
