"""Merging full models: TIES of folders beside the disk's own speed, peak memory, and mergekit on the same folders.

**Speed.** The disk's speed is that of reading all files of all models and the base from the first byte to the last, and
writing as many bytes as the result has, with fsync: what any merge must do at least. Ours, which also ends with fsync,
and the disk are measured in turn, each after the files were put out of the page cache (``posix_fadvise``, which leaves
a virtual machine's host its own cache); then both again with the files in it. Both are judged as shares of the disk's
speed, but only the first has a target.

**Memory.** Peak resident memory of a fresh process that merges, everything included.

**mergekit.** ``run_merge``, in a process of its own, with the same density, weights and type, two threads and
asynchronous writing; files in the page cache. Needs ``make peers``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._measure import Measurement, measured, seconds
from potluck.compose.merging.models import merge_models
from potluck.compose.merging.rules import Ties
from potluck.compose.merging.shards import StoredTensor, created

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers/bin/python"
DENSITY = 0.2
_PIECE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """How much is merged.

    Attributes:
        shapes: For each type, as safetensors names it: layers, width and feed-forward of a Llama.
        models: Beside the base.
        runs: Of each kind.
        mergekit: Whether it is measured, if it is installed.
    """

    shapes: dict[str, tuple[int, int, int]]
    models: int = 4
    runs: int
    vocabulary: int = 32_000
    mergekit: bool = True


MODEL_SIZES = {
    "short": ModelSize(shapes={"F32": (2, 512, 1408)}, runs=3),
    "full": ModelSize(shapes={"F32": (17, 1024, 2816), "BF16": (24, 1280, 3424)}, runs=3),  # 1.0 GB each
}


def measure_models(size: ModelSize) -> list[Measurement]:
    return [result for dtype in size.shapes for result in _ties(size, dtype)]


def write_family(root: Path, size: ModelSize, dtype: str) -> None:
    """A base and models that differ from it, of random weights."""
    layers, width, inner = size.shapes[dtype]
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    forms = {name: StoredTensor(dtype, shape) for name, shape in shapes.items()}
    draw = torch.Generator().manual_seed(0)
    with ExitStack() as files:
        stored = []
        for folder in _folders(root, size):
            folder.mkdir()
            config.save_pretrained(folder)
            stored.append(files.enter_context(created(folder, forms, 2 << 30)))
        for name, form in forms.items():
            base = 0.02 * torch.randn(form.rows, form.columns, generator=draw)
            stored[0][name].write(0, base)
            for model in stored[1:]:
                model[name].write(0, base + 0.002 * torch.randn(base.shape, generator=draw))


def merge(root: Path, size: ModelSize) -> None:
    """Ours, into ``root/merged``."""
    base, *models = _folders(root, size)
    merge_models(models, root / "merged", Ties(DENSITY), base=base)


def peak_bytes(root: Path, size: ModelSize) -> int:
    """Peak memory of this process after merging, from Linux."""
    merge(root, size)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def _folders(root: Path, size: ModelSize) -> list[Path]:
    return [root / "base", *(root / f"model-{i}" for i in range(size.models))]


def _ties(size: ModelSize, dtype: str) -> Iterator[Measurement]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_family(root, size, dtype)
        files = [path / "model.safetensors" for path in _folders(root, size)]
        sizes = [file.stat().st_size for file in files]
        what = f"TIES of {size.models} x {sizes[0] / 1e9:.2g} GB, {dtype}"
        ours: list[float] = []
        for cold in (True, False):
            disks, ours = [], []
            for _ in range(size.runs):
                _prepare(root, files, cold)
                disks.append(seconds(lambda: _disk_alone(files, root / "copied")))
                _prepare(root, files, cold)
                ours.append(seconds(lambda: merge(root, size)))
            speeds = [(sum(sizes) + sizes[0]) / time / 1e9 for time in disks]
            shares = [disk / our for disk, our in zip(disks, ours, strict=True)]
            peer = f"{median(speeds):.2g} GB/s; ours takes {median(ours):.3g} s"
            state, target = ("not in the page cache", 0.5) if cold else ("in the page cache", None)
            yield measured(f"{what}, {state}: speed", shares, "x disk", at_least=target, peer=peer)
        yield from _beside_mergekit(root, size, dtype, what, median(ours))


def _prepare(root: Path, files: Sequence[Path], cold: bool) -> None:
    """What was written is gone; what will be read is in the page cache, or is not."""
    shutil.rmtree(root / "merged", ignore_errors=True)
    (root / "copied").unlink(missing_ok=True)
    for path in files:
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(_PIECE):
                    pass


def _disk_alone(files: Sequence[Path], to: Path) -> None:
    """Read all files; write as many bytes as the first has."""
    piece = memoryview(bytearray(_PIECE))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass
    left = files[0].stat().st_size
    with to.open("wb", buffering=0) as file:
        while left:
            left -= file.write(piece[:left])
        os.fsync(file.fileno())


def _beside_mergekit(root: Path, size: ModelSize, dtype: str, what: str, our_seconds: float) -> Iterator[Measurement]:
    """Peak memory of both, each in a process of its own, and how many times as long mergekit takes."""
    shutil.rmtree(root / "merged", ignore_errors=True)
    code = "from benchmarks._merge_models import *; from pathlib import Path; "
    code += f"print(peak_bytes(Path({str(root)!r}), {size!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    python = sys.executable if find_spec("mergekit") else PEERS
    peak, ratio, told = "", [], "mergekit is not installed: make peers"
    if size.mergekit and Path(python).exists():
        words = [python, "-m", "benchmarks.peers.mergekit_ties", str(root), str(size.models), dtype, str(DENSITY)]
        found = json.loads(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        ratio, told = [found["seconds"] / our_seconds], f"mergekit {found['version']}: {found['seconds']:.3g} s"
        peak = f"mergekit: {found['peak'] / 1e9:.2g} GB"
    yield measured(f"{what}: peak memory", [int(done.stdout) / 1e9], "GB", at_most=1.5, peer=peak or told)
    yield measured(f"{what}: mergekit's time beside ours", ratio, "x", at_least=1 if ratio else None, peer=told)
