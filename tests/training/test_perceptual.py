"""LPIPS, Gram and CLIP terms: gradients in float64, and what each can and cannot see."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

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


def test_maps_against_a_chain_by_hand(vgg: VGG16) -> None:
    """The published numbering, ReLU after every convolution, halved before every group; ImageNet's mean and deviation.

    Those are of pictures in 0..1.
    """
    state = vgg.state_dict()
    given = pictures(1, 32)
    mean, deviation = (
        torch.tensor(values, dtype=torch.float64)[:, None, None]
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    h = ((given + 1) / 2 - mean) / deviation
    for group, found in zip(
        ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)),
        vgg(given),
        strict=True,
    ):
        if group[0]:
            h = h.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
        for number in group:
            h = F.conv2d(h, state[f"features.{number}.weight"], state[f"features.{number}.bias"], padding=1).clamp(
                min=0
            )
        # The mean and the deviation are kept in float32.
        torch.testing.assert_close(found, h, rtol=1e-5, atol=1e-6)


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


def test_lpips_against_a_loop(lpips: LPIPS) -> None:
    generator = torch.Generator().manual_seed(5)
    seen, wanted = ([torch.rand(2, width, 3, 2, generator=generator).double() for width in WIDTHS] for _ in range(2))
    for picture in range(2):
        total = 0.0
        for layer in range(5):
            weight = lpips.get_parameter(f"lin{layer}.model.1.weight").flatten().numpy()
            a, b = seen[layer][picture].numpy(), wanted[layer][picture].numpy()
            for y in range(3):
                for x in range(2):
                    difference = a[:, y, x] / np.linalg.norm(a[:, y, x]) - b[:, y, x] / np.linalg.norm(b[:, y, x])
                    total += float(weight @ difference**2) / 6
        assert float(lpips.of_maps(seen, wanted)[picture]) == pytest.approx(total, rel=1e-6)


def test_where_a_map_is_dead_lpips_has_a_gradient(lpips: LPIPS) -> None:
    seen = [torch.zeros(1, width, 2, 2, dtype=torch.float64, requires_grad=True) for width in WIDTHS]
    lpips.of_maps(seen, [torch.rand(1, width, 2, 2, dtype=torch.float64) for width in WIDTHS]).sum().backward()
    assert all(map_.grad is not None and map_.grad.isfinite().all() for map_ in seen)


def test_clip_term_by_hand() -> None:
    seen, wanted = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [0.0, 2.0]])
    assert float(clip_perceptual(seen, wanted)) == pytest.approx((1 - 24 / 25 + 1 - 0) / 2)
    assert float(clip_perceptual(seen, 5 * seen)) == pytest.approx(0, abs=1e-6)


def test_gram_matrix_against_a_loop() -> None:
    maps = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            by_hand = sum(float(maps[1, i, y, x] * maps[1, j, y, x]) for y in range(4) for x in range(5)) / 60
            assert float(gram_matrix(maps)[1, i, j]) == pytest.approx(by_hand)


def test_gram_loss_by_hand() -> None:
    generator = torch.Generator().manual_seed(4)
    seen, wanted = ([torch.randn(2, 3, 4, 5, generator=generator).double() for _ in range(5)] for _ in range(2))
    parts = []
    for a, b in zip(seen, wanted, strict=True):
        a, b = a.flatten(2).numpy(), b.flatten(2).numpy()
        difference = (np.einsum("bix,bjx->bij", a, a) - np.einsum("bix,bjx->bij", b, b)) / (3 * 4 * 5)
        parts.append((difference**2).mean())
    assert float(gram_loss(seen, wanted)) == pytest.approx(sum(parts[:4]))  # not the fifth
    assert float(gram_loss(seen, wanted, layers=2)) == pytest.approx(sum(parts[:2]))


@pytest.mark.parametrize("seed", [4, 5])
def test_gram_sees_textures_where_the_aligned_terms_are_blind(seed: int) -> None:
    """Two reconstructions of noise at the same L1 and the same LPIPS: one has the texture, one has none.

    The first is noise of another draw, the second one flat colour, chosen such that LPIPS is the same for both.
    """
    torch.manual_seed(seed)
    vgg = VGG16(WIDTHS).double().eval().requires_grad_(False)
    heads = LPIPS(WIDTHS).double().eval().requires_grad_(False)
    for weight in heads.heads():
        weight.uniform_(0, 1)
    rng = np.random.default_rng(7)
    values = np.repeat((-0.5, 0.5), 3 * 64 * 64 // 2)
    rng.shuffle(values)
    other = values.copy()
    for level in (-0.5, 0.5):
        places = np.flatnonzero(values == level)
        other[rng.choice(places, len(places) // 2, replace=False)] *= -1
    target, textured = (torch.from_numpy(array).view(1, 3, 64, 64) for array in (values, other))
    maps = vgg(target)

    def flat(level: float) -> Tensor:
        return torch.full_like(target, level)

    def l1(seen: Tensor) -> float:
        return float((seen - target).abs().mean())

    def aligned(seen: Tensor) -> float:
        return float(heads.of_maps(vgg(seen), maps))

    def gram(seen: Tensor) -> float:
        return float(gram_loss(vgg(seen), maps))

    # As many values are high as low, so that every flat colour between them has the same L1.
    levels = [step / 8 - 0.5 for step in range(9)]
    far, near = (best(levels, key=lambda level: aligned(flat(level))) for best in (max, min))
    wanted = aligned(textured)
    assert aligned(flat(far)) > wanted > aligned(flat(near))
    for _ in range(30):
        middle = (far + near) / 2
        far, near = (middle, near) if aligned(flat(middle)) > wanted else (far, middle)
    smooth = flat(near)

    assert l1(textured) == l1(smooth) == 0.5
    assert aligned(textured) == pytest.approx(aligned(smooth), rel=1e-6)
    assert aligned(textured) > 0.1  # far from the target by either
    assert gram(textured) < gram(smooth) / 50


def test_targets_are_constants(vgg: VGG16, lpips: LPIPS) -> None:
    seen, wanted = pictures(1, 16, 1).requires_grad_(), pictures(1, 16, 2).requires_grad_()
    maps = vgg(wanted)
    clip = clip_perceptual(seen.flatten(1), wanted.flatten(1))
    (lpips.of_maps(vgg(seen), maps).sum() + gram_loss(vgg(seen), maps) + clip).backward()
    assert wanted.grad is None
    assert seen.grad is not None


def test_resampling() -> None:
    picture = pictures(2, 48)
    assert resample_224(picture).shape == (2, 3, 224, 224)
    same = pictures(1, 224)
    assert resample_224(same) is same
    flat = torch.full((1, 3, 500, 300), 0.25)
    torch.testing.assert_close(resample_224(flat), torch.full((1, 3, 224, 224), 0.25))
    # Antialias: stripes of two pixels, made four times smaller, are their mean; else only the light ones are seen.
    lines = torch.tensor([-1.0, 1.0, 1.0, -1.0]).repeat(16).expand(1, 3, 64, 64)
    assert resample_224(lines, side=16)[..., 2:-2, 2:-2].abs().max() < 0.05
    small = pictures(1, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resample_224(x, side=4), (small,))


def test_weights_by_path(tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = VGG16(WIDTHS)
    state = {**net.state_dict(), "classifier.0.weight": torch.zeros(4, 4)}
    torch.save(state, tmp_path / "vgg16.pth")
    loaded = load_vgg(tmp_path / "vgg16.pth", WIDTHS)
    assert torch.equal(loaded.features[0].weight, net.features[0].weight)
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert list(net.state_dict())[:2] == ["features.0.weight", "features.0.bias"]
    assert {int(name.split(".")[1]) for name in net.state_dict()} == {0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28}

    state["features.0.weight"] = torch.zeros(8, 1, 3, 3)
    torch.save(state, tmp_path / "grey.pth")
    with pytest.raises(ValueError, match=r"features\.0\.weight: \(8, 1, 3, 3\), wanted \(8, 3, 3, 3\)"):
        load_vgg(tmp_path / "grey.pth", WIDTHS)
    with pytest.raises(ValueError, match=r"features\.0\.bias: \(8,\), wanted \(64,\)"):
        load_vgg(tmp_path / "vgg16.pth")
    save_file(net.state_dict(), tmp_path / "vgg16.safetensors")
    again = load_vgg(tmp_path / "vgg16.safetensors", WIDTHS)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())


def test_the_published_shapes_are_the_default() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in VGG16().state_dict().items()}
    assert shapes["features.28.weight"] == (512, 512, 3, 3)
    assert sum(math.prod(shape) for shape in shapes.values()) == 14_714_688  # of the published convolutions


@pytest.mark.parametrize("name", ["vgg.pth", "vgg.safetensors"])
def test_what_is_no_state_dict_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_vgg(path)
    for data in (b"", b"<!DOCTYPE html>\n<title>Not found</title>"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="cannot be read as tensors, download it again"):
            load_vgg(path)


def test_only_state_dicts_and_no_code(tmp_path: Path) -> None:
    path = tmp_path / "vgg.pth"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="holds a list; wanted a state dict"):
        load_vgg(path)
    torch.save({"state_dict": VGG16(WIDTHS).state_dict()}, path)
    with pytest.raises(ValueError, match="missing, wanted"):
        load_vgg(path, WIDTHS)
    torch.save(nn.Linear(1, 1), path)  # a pickle that would import and build something
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        load_vgg(path)


def test_heads_by_path(tmp_path: Path, lpips: LPIPS) -> None:
    state = lpips.state_dict()
    assert list(state) == [f"lin{index}.model.1.weight" for index in range(5)]
    assert [tuple(value.shape) for value in LPIPS().state_dict().values()] == [
        (1, width, 1, 1) for width in (64, 128, 256, 512, 512)
    ]
    torch.save(state, tmp_path / "heads.pth")
    loaded = load_lpips(tmp_path / "heads.pth", WIDTHS)
    assert torch.equal(loaded.heads()[4], lpips.heads()[4].float())
    assert not any(weight.requires_grad for weight in loaded.parameters())
    state["lin2.model.1.weight"] = state["lin2.model.1.weight"] - 0.75
    torch.save(state, tmp_path / "negative.pth")
    with pytest.raises(ValueError, match=r"a weight of -0\.\d+; wanted none below 0"):
        load_lpips(tmp_path / "negative.pth", WIDTHS)
