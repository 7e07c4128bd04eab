"""Packed adapters: within the stated error, of the stated size, and what is damaged is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from potluck.compose.adapter import Adapter, Factors
from potluck.compose.library.packed import Packed, load_packed, save_packed, unpack
from potluck.compose.library.packing import Packing, pack
from potluck.errors import ModelError, RecipeError

SHAPES = {"a": (20, 13), "b": (16, 30), "c": (7, 7)}


def adapters_of(seed: int = 0) -> dict[str, Adapter]:
    """Three adapters of mixed ranks and maps, with singular values that fall."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for number, (rank, paths) in enumerate(((6, "abc"), (3, "ab"), (5, "b"))):
        modules = {
            path: Factors(
                torch.randn(rank, SHAPES[path][0], generator=draw),
                torch.randn(SHAPES[path][1], rank, generator=draw) * 0.5 ** torch.arange(rank),
            )
            for path in paths
        }
        found[f"p{number}"] = Adapter(modules, "base", number == 1, {"base_hash": "ab"})
    return found


@pytest.fixture(scope="module")
def adapters() -> dict[str, Adapter]:
    return adapters_of()


@pytest.fixture(scope="module")
def packed(adapters: dict[str, Adapter]) -> Packed:
    return pack(adapters, Packing(error=0.1, pool=32))


@pytest.mark.parametrize("settings", [Packing(error=0.4, pool=16), Packing(error=0.05, pool=64, shard=3)])
def test_the_error_is_within_its_bound_and_what_is_said(adapters: dict[str, Adapter], settings: Packing) -> None:
    packed = pack(adapters, settings)
    found = unpack(packed)
    for name, error in packed.errors.items():
        lost = whole = 0.0
        for path, factors in adapters[name].modules.items():
            delta = factors.to(torch.float64).delta()
            kept = found[name].modules.get(path)
            lost += float((delta - (0 if kept is None else kept.to(torch.float64).delta())).square().sum())
            whole += float(delta.square().sum())
        assert error == pytest.approx((lost / whole) ** 0.5, rel=1e-6)
        assert error <= settings.error


def test_a_file_holds_the_same_in_as_many_bytes_as_said(
    adapters: dict[str, Adapter], packed: Packed, tmp_path: Path
) -> None:
    save_packed(packed, tmp_path / "set.safetensors")
    content = (tmp_path / "set.safetensors").read_bytes()
    assert len(content) - 8 - int.from_bytes(content[:8], "little") == packed.bytes
    ours, theirs = unpack(packed), unpack(load_packed(tmp_path / "set.safetensors"))
    assert list(theirs) == list(adapters)
    assert load_packed(tmp_path / "set.safetensors").errors == packed.errors
    for name, adapter in adapters.items():
        assert (theirs[name].base, theirs[name].transposed) == (adapter.base, adapter.transposed)
        assert theirs[name].about == adapter.about
        assert set(theirs[name].modules) <= set(adapter.modules)
        for path, factors in theirs[name].modules.items():
            assert torch.equal(factors.down, ours[name].modules[path].down)
            assert torch.equal(factors.up, ours[name].modules[path].up)
            assert factors.rank <= adapter.modules[path].rank


def test_packing_is_the_same_in_any_gauge(adapters: dict[str, Adapter], packed: Packed) -> None:
    draw = torch.Generator().manual_seed(1)
    turned = {}
    for name, adapter in adapters.items():
        modules = {}
        for path, factors in adapter.modules.items():
            gauge = torch.randn(factors.rank, factors.rank, generator=draw) + 3 * torch.eye(factors.rank)
            modules[path] = Factors(gauge @ factors.down, factors.up @ torch.linalg.inv(gauge))
        turned[name] = replace(adapter, modules=modules)
    assert abs(pack(turned, Packing(error=0.1, pool=32)).bytes - packed.bytes) <= 0.1 * packed.bytes


def test_less_error_takes_more_bytes(adapters: dict[str, Adapter]) -> None:
    sizes = [pack(adapters, Packing(error=error, pool=32)).bytes for error in (0.5, 0.2, 0.05)]
    assert sizes == sorted(sizes)


def test_small_terms_are_left_out(adapters: dict[str, Adapter]) -> None:
    found = unpack(pack(adapters, Packing(error=0.5, pool=32)))
    assert found["p0"].modules["a"].rank < 6


@pytest.mark.parametrize(
    "settings", [Packing(error=0), Packing(error=1), Packing(pool=1), Packing(pool=257), Packing(shard=0)]
)
def test_settings_out_of_range_are_refused(adapters: dict[str, Adapter], settings: Packing) -> None:
    with pytest.raises(RecipeError):
        pack(adapters, settings)


def test_adapters_that_cannot_be_packed_are_refused(adapters: dict[str, Adapter]) -> None:
    empty = Adapter({"a": Factors(torch.ones(1, 20), torch.zeros(13, 1))})
    with pytest.raises(ModelError, match="empty: adds nothing"):
        pack({**adapters, "empty": empty})
    with pytest.raises(ModelError, match="different shapes"):
        pack({**adapters, "other": Adapter({"a": Factors(torch.ones(1, 21), torch.ones(13, 1))})})
    with pytest.raises(ModelError, match="so small an error"):
        pack(adapters, Packing(error=1e-3, pool=2, shard=16))


def about_of(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    return dict(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"])


@pytest.mark.parametrize(
    "tensor", ["stages", *(f"{side}.{part}" for side in ("down", "up") for part in ("pool", "scales", "indices"))]
)
@pytest.mark.parametrize("damage", ["missing", "shorter", "other type", "out of range"])
def test_what_is_not_as_the_layout_says_is_refused(packed: Packed, tmp_path: Path, tensor: str, damage: str) -> None:
    path = tmp_path / "set.safetensors"
    save_packed(packed, path)
    tensors, about = load_file(path), about_of(path)
    match damage:
        case "missing":
            del tensors[tensor]
        case "shorter":
            tensors[tensor] = tensors[tensor].flatten()[:-1].clone()
        case "other type":
            tensors[tensor] = tensors[tensor].double()
        case _:
            whole = tensors[tensor].dtype == torch.uint8
            tensors[tensor] = tensors[tensor].fill_(255 if whole else float("nan"))
    save_file(tensors, path, about)
    with pytest.raises(ModelError, match=r"set\.safetensors"):
        load_packed(path)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"shard": 5},
        {"modules": []},
        {"modules": [["a", 1 << 30, 13], ["b", 16, 30], ["c", 7, 7]]},
        {"members": []},
        {"more": 1},
    ],
)
def test_a_layout_that_lies_is_refused(packed: Packed, tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "set.safetensors"
    save_packed(packed, path)
    layout = json.loads(about_of(path)["about"])
    save_file(load_file(path), path, {"about": json.dumps({**layout, **change})})
    with pytest.raises(ModelError, match=r"set\.safetensors"):
        load_packed(path)


@pytest.mark.parametrize("content", [None, b"", b"\x00" * 64])
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "set.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"set\.safetensors"):
        load_packed(path)
