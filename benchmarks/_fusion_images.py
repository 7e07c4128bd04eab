"""Four small encoders of digits, each pre-trained on something else, frozen, and fused by a head trained together.

The digits are scikit-learn's, 8 x 8 (UCI, Alpaydin and Kaynak, 1998). The encoders see one part of them, the five
participants share another, unequally by class (Dirichlet 0.3), and the rest is the test. All heads are trained alike:
FedAvg with Adam inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from potluck.aggregation.mean import WeightedMean
from potluck.compose.fusion import prefit
from potluck.models.flat import flatten
from potluck.models.fused import AdaFusion

CLASSES, PARTICIPANTS, COMMON = 10, 5, 32
_PRETRAINED, _TRAINED = 700, 1200  # of 1797
_BATCH, _RATE = 32, 1e-2


@dataclass(frozen=True)
class Digits:
    """Standardised features of every encoder, and labels.

    Attributes:
        shares: The examples of each participant.
        test: Those of nobody.
    """

    features: Mapping[str, Tensor]
    labels: Tensor
    shares: Sequence[Tensor]
    test: Tensor


class Fused(nn.Module):
    """`AdaFusion` and a linear classifier; ``uniform`` leaves the attention as it starts."""

    def __init__(self, widths: Sequence[int], uniform: bool = False) -> None:
        super().__init__()
        self.fusion = AdaFusion(widths, COMMON)
        self.classifier = nn.Linear(COMMON, CLASSES)
        for parameter in (self.fusion.prompt, self.fusion.bias, self.fusion.trust):
            parameter.requires_grad_(not uniform)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        fused, _ = self.fusion(features)
        return self.classifier(fused)


class Concatenated(nn.Module):
    """A linear classifier of all features beside each other."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.classifier = nn.Linear(sum(widths), CLASSES)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.classifier(torch.cat(list(features), dim=-1))


def accuracies(seed: int, rounds: int, pretraining: int) -> tuple[dict[str, float], dict[str, float]]:
    """Test accuracy by way of fusing, and what AdaFusion's attention gives each encoder on the test."""
    digits = prepared(seed, pretraining)
    names, every = list(digits.features), list(digits.features.values())
    widths = [h.shape[1] for h in every]

    def trained(head: nn.Module, features: Sequence[Tensor]) -> float:
        train_together(head, digits, features, rounds, seed)
        with torch.no_grad():
            found = head([h[digits.test] for h in features]).argmax(-1)
        return float((found == digits.labels[digits.test]).double().mean())

    torch.manual_seed(seed)
    found = {name: trained(Concatenated([h.shape[1]]), [h]) for name, h in zip(names, every, strict=True)}
    found["all beside each other"] = trained(Concatenated(widths), every)
    found["uniform"] = trained(Fused(widths, uniform=True), every)
    ada, started = Fused(widths), Fused(widths)
    found["AdaFusion"] = trained(ada, every)
    prefit(started.fusion, [h[torch.cat(list(digits.shares))] for h in every])
    found["AdaFusion, autoencoders first"] = trained(started, every)
    with torch.no_grad():
        attention = ada.fusion([h[digits.test] for h in every])[1].mean(dim=0)
    return found, dict(zip(names, attention.tolist(), strict=True))


def train_together(head: nn.Module, digits: Digits, features: Sequence[Tensor], rounds: int, seed: int) -> None:
    """FedAvg, arXiv 1602.05629: five local steps of each participant, then the mean by numbers of examples."""
    flat, draw = flatten(head, torch.device("cpu")), torch.Generator().manual_seed(seed)
    mean, shared = WeightedMean(len(flat.vector)), flat.vector.clone()
    for _ in range(rounds):
        mean.init(len(shared))
        for share in digits.shares:
            flat.vector.copy_(shared)
            optimizer = torch.optim.Adam(flat.parameters, lr=_RATE)
            for _ in range(5):
                batch = share[torch.randint(len(share), (_BATCH,), generator=draw)]
                loss = cross_entropy(head([h[batch] for h in features]), digits.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            mean.accumulate(flat.vector, float(len(share)))
        shared.copy_(mean.finish())
    flat.vector.copy_(shared)


def prepared(seed: int, pretraining: int) -> Digits:
    """Encoders, features and shares of a seed."""
    from sklearn.datasets import load_digits

    draw = np.random.default_rng(seed)
    order = draw.permutation(1797)
    given = load_digits()
    images = torch.tensor(given.images[order] / 16, dtype=torch.float32)
    labels = torch.tensor(given.target[order], dtype=torch.int64)
    torch.manual_seed(seed)
    encoders = _encoders(images[:_PRETRAINED], labels[:_PRETRAINED], pretraining)
    with torch.no_grad():
        raw = {name: encoder.eval()(images) for name, encoder in encoders.items()}
    features = {name: (h - h[:_PRETRAINED].mean(0)) / h[:_PRETRAINED].std() for name, h in raw.items()}
    shares: list[list[int]] = [[] for _ in range(PARTICIPANTS)]
    for label in range(CLASSES):
        mine = _PRETRAINED + np.flatnonzero(labels[_PRETRAINED:_TRAINED].numpy() == label)
        cuts = (np.cumsum(draw.dirichlet([0.3] * PARTICIPANTS))[:-1] * len(mine)).astype(int)
        for share, part in zip(shares, np.split(mine, cuts), strict=True):
            share += part.tolist()
    return Digits(features, labels, [torch.tensor(s) for s in shares if s], torch.arange(_TRAINED, 1797))


def _encoders(images: Tensor, labels: Tensor, steps: int) -> dict[str, nn.Module]:
    """By what each was pre-trained on: half of the classes, the other half, rotations, the images themselves."""
    low, high, turned, coded = _mlp(64, 32), _mlp(40, 24), _convolutions(), _mlp(48, 16, last=False)
    heads = (nn.Linear(32, 5), nn.Linear(24, 5), nn.Linear(48, 4))
    decoder = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 64))
    first, second = torch.nonzero(labels < 5).flatten(), torch.nonzero(labels >= 5).flatten()
    everything = torch.arange(len(labels))

    def rotations(batch: Tensor) -> Tensor:
        quarter = torch.arange(4)
        turns = torch.cat([torch.rot90(images[batch], int(k), (1, 2)) for k in quarter])
        return cross_entropy(heads[2](turned(turns)), quarter.repeat_interleave(len(batch)))

    _fit([low, heads[0]], first, lambda batch: cross_entropy(heads[0](low(images[batch])), labels[batch]), steps)
    _fit([high, heads[1]], second, lambda b: cross_entropy(heads[1](high(images[b])), labels[b] - 5), steps)
    _fit([turned, heads[2]], everything, rotations, steps)
    _fit([coded, decoder], everything, lambda b: mse_loss(decoder(coded(images[b])), images[b].flatten(1)), steps)
    return {"classes 0 to 4": low, "classes 5 to 9": high, "rotations": turned, "autoencoder": coded}


def _mlp(inner: int, width: int, last: bool = True) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(64, inner), nn.ReLU(), nn.Linear(inner, width)]
    return nn.Sequential(*layers, *([nn.ReLU()] if last else []))


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    )  # fmt: skip


def _fit(modules: Sequence[nn.Module], pool: Tensor, loss_of: Callable[[Tensor], Tensor], steps: int) -> None:
    optimizer = torch.optim.AdamW(nn.ModuleList(modules).parameters(), lr=3e-3)
    for _ in range(steps):
        loss = loss_of(pool[torch.randint(len(pool), (64,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
