"""LPIPS, Gram and CLIP terms: gradients in float64, and what each can and cannot see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from training.perceptual import LPIPS, clip_perceptual, gram_loss, gram_matrix, load_lpips, resample_224
from training.vgg import VGG16, load_vgg

WIDTHS = (8, 8, 12, 12, 12)


@pytest.fixture(scope="module")
def vgg() -> VGG16:
    torch.manual_seed(0)
    return VGG16(WIDTHS).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    torch.manual_seed(1)
    heads = LPIPS(WIDTHS).double().eval().requires_grad_(False)
    for weight in heads.heads():
        weight.uniform_(0, 1)
    return heads


def pictures(count: int, side: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def test_maps_of_vgg(vgg: VGG16) -> None:
    maps = vgg(pictures(2, 37))
    assert [tuple(map_.shape) for map_ in maps] == [
        (2, 8, 37, 37),
        (2, 8, 18, 18),
        (2, 12, 9, 9),
        (2, 12, 4, 4),
        (2, 12, 2, 2),
    ]
    assert all(float(map_.min()) >= 0 for map_ in maps)
    with pytest.raises(ValueError, match=r"\(3, 32, 32\); wanted \[B, 3, H, W\]"):
        vgg(pictures(1, 32)[0])


def test_gradients_in_float64(vgg: VGG16, lpips: LPIPS) -> None:
    wanted = pictures(2, 16, seed=1)
    start = pictures(2, 16, seed=2)
    # Along random directions: the picture has 1536 values.
    for name, term in {
        "lpips": lambda seen: lpips(vgg, seen, wanted).sum(),
        "gram": lambda seen: gram_loss(vgg(seen), vgg(wanted)),
        "clip": lambda seen: clip_perceptual(seen.flatten(1), wanted.flatten(1)),
    }.items():
        directions = torch.randn(6, *start.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

        def along(steps: Tensor, term=term, directions=directions) -> Tensor:  # type: ignore[no-untyped-def]
            return term(start + (steps[:, None, None, None, None] * directions).sum(0))

        steps = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(along, (steps,), eps=1e-7, atol=1e-7, rtol=1e-3), name
        assert torch.autograd.grad(along(steps), steps)[0].abs().min() > 0, name


def test_lpips_is_a_distance(vgg: VGG16, lpips: LPIPS) -> None:
    a, b = pictures(3, 32, seed=1), pictures(3, 32, seed=2)
    assert lpips(vgg, a, a).abs().max() < 1e-12
    torch.testing.assert_close(lpips(vgg, a, b), lpips(vgg, b, a))
    assert lpips(vgg, a, b).shape == (3,)
    near, far = lpips(vgg, a + 0.1 * (b - a), a), lpips(vgg, b, a)
    assert (near < far).all()


def test_gram_matrix_against_a_loop() -> None:
    maps = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            by_hand = sum(float(maps[1, i, y, x] * maps[1, j, y, x]) for y in range(4) for x in range(5)) / 60
            assert float(gram_matrix(maps)[1, i, j]) == pytest.approx(by_hand)


def test_gram_sees_textures_where_the_aligned_terms_are_blind(vgg: VGG16) -> None:
    """Two reconstructions of noise, at the same L1 and the same distance of maps: one keeps the texture, one is smooth.

    The first is noise of another draw, the second the mean. Terms that compare place by place cannot tell them apart,
    or like the mean better.
    """
    rng = np.random.default_rng(0)
    # Of noise of two values: another draw is wrong by 1 on half of the pixels, the mean by 0.5 on all.
    target, textured = (torch.from_numpy(np.sign(rng.normal(size=(1, 3, 64, 64))) * 0.5) for _ in range(2))
    smooth = torch.zeros_like(target)

    def l1(seen: Tensor) -> float:
        return float((seen - target).abs().mean())

    def aligned(seen: Tensor) -> float:
        maps, wanted = vgg(seen), vgg(target)
        return float(
            torch.stack([(a - b).square().mean() / b.square().mean() for a, b in zip(maps, wanted, strict=True)]).mean()
        )

    def gram(seen: Tensor) -> float:
        return float(gram_loss(vgg(seen), vgg(target)))

    assert l1(textured) == pytest.approx(l1(smooth), rel=0.05)
    assert aligned(textured) > 0.7 * aligned(smooth)
    assert gram(textured) < gram(smooth) / 10


def test_targets_are_constants(vgg: VGG16, lpips: LPIPS) -> None:
    seen, wanted = pictures(1, 16, 1).requires_grad_(), pictures(1, 16, 2).requires_grad_()
    maps = vgg(wanted)
    (lpips.of_maps(vgg(seen), maps).sum() + gram_loss(vgg(seen), maps)).backward()
    assert wanted.grad is None
    assert seen.grad is not None


def test_resampling() -> None:
    picture = pictures(2, 48)
    assert resample_224(picture).shape == (2, 3, 224, 224)
    same = pictures(1, 224)
    assert resample_224(same) is same
    flat = torch.full((1, 3, 500, 300), 0.25)
    torch.testing.assert_close(resample_224(flat), torch.full((1, 3, 224, 224), 0.25))


def test_weights_by_path(tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = VGG16()
    state = {**net.state_dict(), "classifier.0.weight": torch.zeros(4, 4)}
    torch.save(state, tmp_path / "vgg16.pth")
    loaded = load_vgg(tmp_path / "vgg16.pth")
    assert torch.equal(loaded.features[0].weight, net.features[0].weight)
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert list(net.state_dict())[:2] == ["features.0.weight", "features.0.bias"]
    assert {int(name.split(".")[1]) for name in net.state_dict()} == {0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28}

    state["features.0.weight"] = torch.zeros(64, 1, 3, 3)
    torch.save(state, tmp_path / "grey.pth")
    with pytest.raises(ValueError, match=r"features\.0\.weight: \(64, 1, 3, 3\), wanted \(64, 3, 3, 3\)"):
        load_vgg(tmp_path / "grey.pth")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth: no such file"):
        load_vgg(tmp_path / "nothing.pth")
    heads = LPIPS()
    torch.save(heads.state_dict(), tmp_path / "heads.pth")
    assert list(heads.state_dict()) == [f"lin{index}.model.1.weight" for index in range(5)]
    assert torch.equal(load_lpips(tmp_path / "heads.pth").heads()[4], heads.heads()[4])
