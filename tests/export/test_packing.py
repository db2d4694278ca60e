"""Packing: unchanged blocks keep their bytes, codes are neighbours, and rounding does not undo the edit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.utils.quantization_config import FineGrainedFP8Config

from excise.checkpoints.dequantise import mxfp4, wide_fp8
from excise.export.packing import (
    _FP4,
    _FP8,
    Grid,
    Repacked,
    _rounded,
    output_directions,
    repack_fp8,
    repack_mxfp4,
)
from excise.model.edits import Edit

LAYOUTS = ("blocks", "rows", "one", "powers", "half rows")
BLOCK = (16, 24)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(weight: Tensor, layout: str) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
    """A matrix in FP8: values, scales, and the block; every scale is found anew with loops."""
    o, i = weight.shape
    b, c = {"blocks": BLOCK, "powers": BLOCK, "one": (o, i)}.get(layout, (1, i))
    scales = torch.empty(-(-o // b), -(-i // c))
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            part = weight[row * b : (row + 1) * b, column * c : (column + 1) * c]
            scales[row, column] = part.abs().max() / 448
    if layout == "powers":
        scales = torch.exp2(scales.log2().ceil()).to(torch.float8_e8m0fnu)
    if layout == "half rows":
        scales = scales.half()[:, 0]
    if layout == "one":
        scales = scales.reshape(())
    wide = scales.float().reshape(-(-o // b), -(-i // c)).repeat_interleave(b, 0)
    wide = wide.repeat_interleave(c, 1)[:o, :i]
    values = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values, scales, BLOCK if (b, c) == BLOCK else None


def ablation(weight: Tensor, seed: int = 1) -> Edit:
    """The removal of a random direction, row norms kept."""
    v = torch.nn.functional.normalize(random(len(weight), seed=seed), dim=0)
    n = weight.norm(dim=1)
    a = v @ (weight / n[:, None])
    left = (n * v)[:, None]
    scale = n / (weight - left @ a[None]).norm(dim=1)
    return Edit(left, a[None].contiguous(), scale)


def nothing(weight: Tensor) -> Tensor:
    return torch.zeros(len(weight), 0)


def error(found: Repacked) -> float:
    return float((found.squares[0] / found.squares[1]) ** 0.5)


def test_numbers_are_those_of_torchs_own_cast() -> None:
    x = torch.cat([random(4000) * 10.0**k for k in range(-4, 3)]).clamp(-448, 448)
    ties = torch.tensor([0.0, 0.25, 0.75, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10, -17.0])
    for dtype, grid in _FP8.items():
        every = torch.cat([x, ties])
        expected = every.to(dtype).view(torch.uint8)
        found = grid.codes(grid.nearest(every), every)
        assert torch.equal(found & 127, expected & 127)
        assert torch.equal(found.view(dtype).float(), every.to(dtype).float())


@pytest.mark.parametrize("grid", [_FP4, *_FP8.values()])
def test_the_code_beside_is_on_the_other_side(grid: Grid) -> None:
    x = random(3000) * grid.limit / 4
    near = grid.magnitudes[grid.nearest(x)]
    beside = grid.magnitudes[grid.beside(grid.nearest(x), x)]
    inside = (x.abs() < grid.limit) & (near != x.abs())
    assert bool((((near < x.abs()) != (beside < x.abs())) | ~inside).all())
    assert bool(((x.abs() - near).abs() <= (x.abs() - beside).abs())[inside].all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_changed_keeps_its_bytes(layout: str) -> None:
    values, scales, block = packed(random(50, 70), layout)
    weight = wide_fp8(values, scales, block)
    same = repack_fp8(weight, values, scales, block, nothing(weight))
    assert torch.equal(same.values.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(same.scales.float(), scales.float())
    assert (same.scales.dtype, same.scales.shape) == (scales.dtype, scales.shape)
    assert (same.squares[0], same.along) == (0.0, (0.0, 0.0))
    one = weight.clone()
    one[20, 30] *= 1.5
    found = repack_fp8(one, values, scales, block, nothing(weight))
    rows, columns = (found.values.view(torch.uint8) != values.view(torch.uint8)).nonzero().unbind(1)
    if layout in ("blocks", "powers"):
        assert ({*(rows // 16).tolist()}, {*(columns // 24).tolist()}) <= ({1}, {1})
    elif "rows" in layout:
        assert {*rows.tolist()} <= {20}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_does_not_undo_an_edit_where_the_nearest_codes_would(layout: str) -> None:
    original = random(320, 120)
    values, scales, block = packed(original, layout)
    weight = wide_fp8(values, scales, block)
    edit = ablation(weight)
    edited = edit.apply_to_weight(weight)
    n = weight.norm(dim=1, keepdim=True)
    v = (edit.left / n)[:, 0]

    def left(matrix: Tensor) -> float:
        return float((v @ (matrix / n)).norm() / (v @ (weight / n)).norm())

    kept = repack_fp8(edited, values, scales, block, output_directions(edit, weight))
    near = repack_fp8(edited, values, scales, block, nothing(weight))
    after = [wide_fp8(r.values, r.scales, block) for r in (kept, near)]
    assert left(after[0]) < left(edited) + 0.005
    assert left(after[1]) > left(edited) + 0.01
    assert (kept.along[0] / kept.along[1]) ** 0.5 < 0.02
    # What is stated is what stands there, and no more than packing cost the original.
    assert float((after[0] - edited).norm() / edited.norm()) == pytest.approx(error(kept), rel=1e-3)
    assert error(near) <= error(kept) < 1.3 * float((weight - original).norm() / original.norm())


def test_scales_in_blocks_are_those_of_transformers() -> None:
    weight = random(64, 96)
    quantizer = type(
        "Q", (), {"quantization_config": FineGrainedFP8Config(weight_block_size=(16, 24))}
    )
    theirs = Fp8Quantize(quantizer())._quantize_one("a.weight", weight)
    zeros = torch.zeros_like(theirs["a.weight"])
    ones = torch.ones_like(theirs["a.weight_scale_inv"])
    ones[0, 0] = 0.7  # not all powers of two
    found = repack_fp8(weight, zeros, ones, BLOCK, nothing(weight))
    torch.testing.assert_close(found.scales, theirs["a.weight_scale_inv"], rtol=1e-6, atol=0)
    apart = (found.values.float() != theirs["a.weight"].float()).float().mean()
    assert apart < 0.001  # a quotient that rounds the other way


def test_the_feedback_is_the_slow_one() -> None:
    """Each value in turn, in float64: the code that leaves least along the directions and in itself."""
    w, scales = random(12, 9), torch.full((12, 9), 0.01)
    basis = torch.linalg.qr(random(12, 2, seed=3))[0]
    codes, found = _rounded(_FP8[torch.float8_e4m3fn], w, scales, basis)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    behind = torch.zeros(2, 9, dtype=torch.float64)
    for row in range(12):
        for column in range(9):
            x = float(w[row, column]) / float(scales[row, column])
            below = (
                every[every <= x].max() if bool((every <= x).any()) else every.nan_to_num().min()
            )
            above = every[every >= x].min()
            best = min(
                (below, above),
                key=lambda value: (
                    6 * float((behind[:, column] + basis[row] * (x - value) * 0.01).square().sum())
                    + float(((x - value) * 0.01) ** 2)
                ),
            )
            behind[:, column] += basis[row] * (x - best) * 0.01
            assert float(found[row, column]) == pytest.approx(float(best) * 0.01, rel=1e-6)
    assert torch.equal(codes.view(torch.float8_e4m3fn).float() * 0.01, found)


def four_bits(o: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random values and scales of MXFP4, and what they stand for."""
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (o, groups, 16), dtype=torch.uint8, generator=draw)
    scales = torch.randint(119, 122, (o, groups), dtype=torch.uint8, generator=draw)
    return blocks, scales, mxfp4(blocks[None], scales[None])[0].mT.float()


def test_mxfp4_keeps_what_is_not_changed_and_does_not_undo_an_edit() -> None:
    blocks, scales, weight = four_bits(192, 6)
    same = repack_mxfp4(weight, blocks, scales, nothing(weight))
    assert torch.equal(same.values, blocks)
    assert torch.equal(same.scales, scales)
    edit = ablation(weight)
    edited = edit.apply_to_weight(weight)
    found = repack_mxfp4(edited, blocks, scales, output_directions(edit, weight))
    near = repack_mxfp4(edited, blocks, scales, nothing(weight))
    n = weight.norm(dim=1, keepdim=True)
    v = (edit.left / n)[:, 0]
    parts = [mxfp4(r.values[None], r.scales[None])[0].mT.float() for r in (found, near)]
    left = [float((v @ (m / n)).norm() / (v @ (weight / n)).norm()) for m in parts]
    assert left[0] < 0.08 < 0.2 < left[1]
    assert (parts[0] - edited).norm() / edited.norm() == pytest.approx(error(found), rel=1e-3)


def test_mxfp4_takes_the_exponent_that_is_nearer() -> None:
    """The specification's, floor(log2(largest)) - 2, cuts what is above 6 of it; the next does not."""
    blocks, scales, _ = four_bits(64, 4)
    weight = random(64, 128)
    found = repack_mxfp4(weight, blocks, scales, nothing(weight))
    low = torch.floor(weight.view(64, 4, 32).abs().amax(-1).log2()).int() - 2 + 127
    assert bool(((found.scales == low) | (found.scales == low + 1)).all())
    assert bool((found.scales == low).any())
    assert bool((found.scales == low + 1).any())
    assert error(found) < 0.12
    zero = repack_mxfp4(torch.zeros(64, 128), blocks, scales, nothing(weight))
    assert not bool(mxfp4(zero.values[None], zero.scales[None]).any())
