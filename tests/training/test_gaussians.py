"""Training of the small Gaussian decoder: an object is prepared whole, and steps make it nearer to its pictures."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from model import Tokenizer
from model.gaussian_decoder import GaussianDecoder
from model.rasterizer import render
from tests.media.meshes import arms_glb
from training import gaussians
from training.gaussian_start import colour_start
from training.gaussians import Object, Perceptual, Shot, loss_of, main, perceptual_of, prepare, score, take_shot, train
from training.perceptual import LPIPS
from training.rendered import RenderedWeights
from training.vgg import VGG16


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Object:
    path = tmp_path_factory.mktemp("meshes") / "arms.glb"
    path.write_bytes(arms_glb())
    return prepare(path, Tokenizer.load("tiny-continuous", device="cpu"), views=4, side=32, turn=0.3)


def test_an_object_is_whole(arms: Object) -> None:
    assert arms.coords.shape == (len(arms.feats), 4)
    assert arms.decoded.shape == arms.feats.shape
    assert float(arms.feats.min()) >= -1
    assert arms.pictures.shape == (4, 32, 32, 3)
    assert (arms.pictures.reshape(-1, 3).max(dim=0).values > 200).all(), "all three colours are to be seen"


def part_of(item: Object, count: int) -> Object:
    """Every so many of its voxels, in pictures of eight pixels: a step is short."""
    rows = slice(None, None, len(item.coords) // count)
    small = item.pictures.reshape(4, 8, 4, 8, 4, 3).float().mean(dim=(2, 4)).byte()
    cut = {name: getattr(item, name)[rows] for name in ("feats", "decoded", "coords")}
    return dataclasses.replace(item, pictures=small.repeat_interleave(2, 1).repeat_interleave(2, 2), **cut)


def whole(item: Object, view: int) -> Shot:
    return Shot(
        picture=item.pictures[view], world_to_camera=item.world_to_camera[view], intrinsics=item.intrinsics[view]
    )


def test_a_shot_is_the_view_in_fewer_pixels_or_a_piece_of_it(arms: Object) -> None:
    """What the camera of a piece sees is what is in the piece."""
    chance = np.random.default_rng(0)
    shots = [take_shot(arms, chance, side=16) for _ in range(20)]
    near = [float(shot.intrinsics[0, 0]) > 1.5 * float(arms.intrinsics[0, 0, 0]) for shot in shots]
    assert 4 < sum(near) < 16
    net = colour_start()
    splats = net.splats(net(arms.feats, arms.coords), arms.coords)
    for shot in shots:
        assert shot.picture.shape == (16, 16, 3)
        seen = render(splats, shot.world_to_camera, shot.intrinsics, height=16, width=16).colour.detach()
        view = next(i for i in range(4) if torch.equal(arms.world_to_camera[i], shot.world_to_camera))
        other = render(splats, arms.world_to_camera[view], arms.intrinsics[view], height=32, width=32).colour.detach()
        assert (seen - shot.picture / 255).abs().mean() < 0.12
        if float(shot.intrinsics[0, 0]) > 1.5 * float(arms.intrinsics[0, 0, 0]):
            left, top = ((arms.intrinsics[view, :2, 2] * 2 - shot.intrinsics[:2, 2]) * 16).round().int().tolist()
            assert (
                seen - other[top : top + 16, left : left + 16]
            ).abs().max() < 0.05  # Gaussians beside the picture are cut


def test_steps_bring_it_nearer_to_its_pictures_and_repeat(arms: Object) -> None:
    item = part_of(arms, 200)

    def loss(net: GaussianDecoder) -> float:
        with torch.no_grad():
            return sum(float(loss_of(net, item, item.decoded, whole(item, view))) for view in range(4))

    net, taken = train([item], seconds=math.inf, steps=16, rate=2e-4, seed=1)
    assert taken == 16
    assert loss(net) < 0.97 * loss(colour_start(seed=1))
    again, _ = train([item], seconds=math.inf, steps=16, rate=2e-4, seed=1)
    for one, other in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_scores_are_of_what_the_tokenizer_gives_back(arms: Object) -> None:
    found = score(colour_start(), [arms])
    assert 12 < found["psnr"] < 40
    assert 0.2 < found["ssim"] < 1


def test_a_loss_that_is_not_finite_stops_before_the_step(arms: Object) -> None:
    small = part_of(arms, 50)
    broken = dataclasses.replace(small, pictures=torch.full(small.pictures.shape, np.nan))
    assert not torch.isfinite(loss_of(colour_start(), broken, broken.decoded, whole(broken, 0)))
    with pytest.raises(FloatingPointError, match=r"arms\.glb"):
        train([broken], seconds=60, steps=1, rate=1e-3, seed=0)


def test_no_time_is_no_step(arms: Object, tmp_path: Path) -> None:
    _, taken = train([arms], seconds=0, steps=5, rate=1e-3, seed=0)
    assert taken == 0


def test_lpips_counts_once_its_networks_are_given(arms: Object) -> None:
    torch.manual_seed(0)
    nets = VGG16((8, 8, 8, 8, 8)), LPIPS((8, 8, 8, 8, 8))
    for weight in nets[1].heads():
        weight.data.uniform_(0, 1)
    item = part_of(arms, 100)
    net, shot = colour_start(), whole(item, 0)
    splats = net.splats(net(item.feats, item.coords), item.coords)
    seen = render(splats, shot.world_to_camera, shot.intrinsics, height=16, width=16).colour.movedim(2, 0)[None]
    term = nets[1](nets[0], 2 * seen - 1, 2 * (shot.picture.float() / 255).movedim(2, 0)[None] - 1)[0]
    without, loss = (loss_of(net, item, item.feats, shot, given) for given in (None, nets))
    assert float(term.detach()) > 0.01
    torch.testing.assert_close(loss, without + RenderedWeights().lpips * term)
    with_it, plain, again = (
        train([item], seconds=math.inf, steps=2, rate=1e-3, seed=0, perceptual=given)[0] for given in (nets, None, None)
    )
    same = [torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True)]
    other = [torch.equal(a, b) for a, b in zip(plain.parameters(), with_it.parameters(), strict=True)]
    assert all(same)
    assert not all(other)


def test_the_command_hands_the_networks_to_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(VGG16().state_dict(), tmp_path / "vgg.pth")
    torch.save({name: value.abs() for name, value in LPIPS().state_dict().items()}, tmp_path / "heads.pth")
    for name in ("train", "eval"):
        (tmp_path / name).mkdir()
    given: list[Perceptual | None] = []

    def trained(*_: object, perceptual: Perceptual | None, **__: object) -> tuple[GaussianDecoder, int]:
        given.append(perceptual)
        return colour_start(), 0

    monkeypatch.setattr(gaussians, "train", trained)
    monkeypatch.setattr(gaussians, "score", lambda *_: {"psnr": 0.0})
    words = [str(tmp_path), str(tmp_path / "out.safetensors")]
    main([*words, "--vgg", str(tmp_path / "vgg.pth"), "--lpips", str(tmp_path / "heads.pth")])
    main(words)
    assert given[0] is not None
    assert torch.equal(given[0][0].features[0].bias, torch.load(tmp_path / "vgg.pth")["features.0.bias"])
    assert given[1] is None
    with pytest.raises(SystemExit):
        main([*words, "--vgg", str(tmp_path / "vgg.pth")])
    assert "--lpips not given: no such file. LPIPS heads of VGG: curl" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"--vgg .*nothing\.pth: no such file\. VGG16 of torchvision: curl"):
        perceptual_of(tmp_path / "nothing.pth", tmp_path / "heads.pth")
