"""DiLoCo and FedAvg in one file: M participants train one language model and keep their text.

    python examples/one_file_diloco.py                    # three packages of Python's standard library
    python examples/one_file_diloco.py mine.txt yours/    # one participant per file or folder of texts

It imports nothing of potluck and is tested to compute the same numbers, bit for bit. Read it beside the papers:

=======  ==============================================================================================
loop     ``diloco``: DiLoCo (arXiv 2311.08105), algorithm 1. With ``outer_momentum=0`` and ``outer_rate=1`` it is
         FedAvg (arXiv 1602.05629), algorithm 1, with every participant in every round.
inside   ``local_step``: AdamW (arXiv 1711.05101, algorithm 2), whose moments each participant keeps between
         rounds; the gradient clipped by its norm (arXiv 1211.5063, algorithm 1); the rate ``cosine`` (arXiv
         1608.03983, equation 5, without restarts) over the local steps of the whole run.
mean     sum_i n_i theta_i / sum_i n_i, FedAvg's weighted average, taken in one participant at a time.
outside  Nesterov momentum as PyTorch writes it: b <- mu b + Delta, theta <- theta - eta (Delta + mu b).
score    bits per byte: nats on held-out text / (ln 2 x its bytes).
=======  ==============================================================================================

theta is the shared state as one flat vector, theta_i what participant i made of it after H local steps, and
Delta = theta - mean_i theta_i the pseudo-gradient ("outer gradient" in DiLoCo): positive is descent.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from transformers import LlamaConfig, LlamaForCausalLM

BatchesOf = Callable[[int, int, int], Tensor]  # (participant, round, step) -> int64 (batch, length + 1)


def diloco(
    model: nn.Module,
    batches_of: BatchesOf,
    *,
    participants: int,
    rounds: int,
    local_steps: int,
    outer_rate: float = 0.7,
    outer_momentum: float = 0.9,
    inner_rate: float = 2e-3,
    warmup: int = 0,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Train ``model`` together, in place.

    Args:
        weights: n_i, what each participant counts in the mean; all the same if left out.

    Returns:
        The final theta.
    """
    theta = parameters_to_vector(model.parameters()).detach()
    momentum = torch.zeros_like(theta)
    members = [copy.deepcopy(model) for _ in range(participants)]
    optimizers = [adamw(member, inner_rate) for member in members]

    for number in range(rounds):
        mean, total = torch.zeros_like(theta), 0.0
        for i, member in enumerate(members):
            vector_to_parameters(theta.clone(), member.parameters())  # theta_i <- theta
            first = number * local_steps
            for step in range(local_steps):
                rate = inner_rate * cosine(first + step, rounds * local_steps, warmup)
                local_step(member, optimizers[i], batches_of(i, number, step), rate)
            theta_i = parameters_to_vector(member.parameters()).detach()

            n_i = weights[i] if weights else 1.0
            total += n_i
            mean.lerp_(theta_i, n_i / total)  # mean <- mean + (n_i / total)(theta_i - mean)

        if outer_momentum == 0:
            theta.lerp_(mean, outer_rate)  # theta <- theta - eta Delta, exact for eta = 1
        else:
            delta = theta - mean
            momentum.mul_(outer_momentum).add_(delta)  # b <- mu b + Delta
            theta.sub_(delta.add(momentum, alpha=outer_momentum), alpha=outer_rate)  # - eta (Delta + mu b)

    vector_to_parameters(theta, model.parameters())
    return theta


def local_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, rate: float) -> None:
    """One step on ``-mean ln p(token | those before it)``; batch is int64 (batch, length + 1)."""
    model.train()
    optimizer.zero_grad()
    loss = cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices and spares vectors."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), eps=1e-8, fused=True)


def cosine(step: int, total: int, warmup: int, final: float = 0.1) -> float:
    """Fraction of the peak rate: up in a line, down to ``final`` in half a cosine."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (total - warmup)
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


@torch.inference_mode()
def nats(model: nn.Module, stream: Tensor, length: int) -> float:
    """``-ln p`` of every token but the first, in stretches of ``length``; stream is int64 (T,)."""
    model.eval()
    total = 0.0
    for start in range(0, len(stream) - 1, length):
        piece = stream[start : start + length + 1]
        total += float(cross_entropy(model(piece[None, :-1]).logits[0], piece[1:], reduction="sum"))
    return total


# --- what is trained on: a byte is a token, 256 begins a document ----------------------------------

BEGIN = 256
LENGTH, BATCH, ROUNDS, LOCAL_STEPS, WARMUP = 64, 8, 10, 20, 20
DEFAULT = [Path(sysconfig.get_path("stdlib")) / package for package in ("asyncio", "email", "unittest")]


def text_of(place: Path) -> tuple[Tensor, Tensor]:
    """One participant's training and held-out tokens, from a file or the text files below a folder."""
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in {".txt", ".md", ".py"})
    random.Random(0).shuffle(files)
    tokens = torch.tensor([token for file in files for token in (BEGIN, *file.read_bytes())])
    aside = min(20_000, len(tokens) // 5)
    if aside <= LENGTH:
        sys.exit(f"{place}: {len(tokens)} bytes of text are too few")
    return tokens[:-aside], tokens[-aside:]


def main(places: list[Path]) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=BEGIN + 1, hidden_size=128, intermediate_size=352, num_hidden_layers=2,
                    num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True)
    )  # fmt: skip
    train, held_out = zip(*map(text_of, places), strict=True)

    def batches_of(participant: int, number: int, step: int) -> Tensor:
        draw = random.Random(f"{participant}/{number}/{step}")
        starts = [draw.randrange(len(train[participant]) - LENGTH) for _ in range(BATCH)]
        return torch.stack([train[participant][start : start + LENGTH + 1] for start in starts])

    def show(name: str, trained: nn.Module) -> None:
        bits = [nats(trained, tokens, LENGTH) / math.log(2) for tokens in held_out]
        sizes = [int((tokens != BEGIN).sum()) for tokens in held_out]
        scores = [*(b / size for b, size in zip(bits, sizes, strict=True)), sum(bits) / sum(sizes)]
        print(f"{name:>20}", *(f"{score:>12.3f}" for score in scores), flush=True)

    print(f"{'bits per byte':>20}", *(f"{name[:12]:>12}" for name in [*(p.stem for p in places), "union"]))
    show("untrained", model)
    plan = {"rounds": ROUNDS, "local_steps": LOCAL_STEPS, "warmup": WARMUP}
    for i, place in enumerate(places):  # one participant, eta 1, mu 0: plain AdamW
        alone, its = copy.deepcopy(model), lambda _, number, step, i=i: batches_of(i, number, step)
        diloco(alone, its, participants=1, outer_rate=1.0, outer_momentum=0.0, **plan)
        show(f"{place.stem[:14]} alone", alone)
    for eta, mu in ((1.0, 0.0), (0.7, 0.5)):  # so few rounds do not repay the 0.9 of the paper
        together = copy.deepcopy(model)
        diloco(together, batches_of, participants=len(places), outer_rate=eta, outer_momentum=mu, **plan)
        show("DiLoCo" if mu else "FedAvg", together)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]] or DEFAULT)
