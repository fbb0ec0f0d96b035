"""Reconstruction: numbers as computed by hand, the traps of the field, and nothing printed that was not measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from media.mesh_views import sphere_cameras
from media.types import Image, Video, Voxels
from model import Tokenizer
from model.rasterizer import render
from model.splat_decoder import SplatDecoder
from tests.media.meshes import arms_glb
from tests.paths import DATA, needs_data
from tests.training.conftest import scene
from tests.training.scripted import SMALL_I3D, SMALL_INCEPTION, Clips, Pictures, script
from training import evaluation, feature_nets
from training.eval_items import find_items, read_clip, read_image
from training.evaluate import main
from training.evaluation import evaluate
from training.feature_nets import Networks, load_feature_net
from training.frechet import FeatureStats, frechet_distance
from training.gaussians import Object, prepare, score
from training.metrics import psnr, ssim
from training.protocols import PROTOCOLS
from training.samples import voxels_bytes
from training.tally import Tally, ssim_on
from training.token_stats import CodeCounts, TokenStats, sidecar_name

PLAIN = PROTOCOLS["plain"]


@pytest.fixture(scope="module")
def continuous() -> Tokenizer:
    return Tokenizer.load("tiny-continuous", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def discrete() -> Tokenizer:
    return Tokenizer.load("tiny-discrete", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(4):
        PIL.Image.fromarray(scene(index, 70 + index, 100)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of frames, of 10 and 12."""
    folder = tmp_path_factory.mktemp("clips")
    for name, count in (("bear", 10), ("swan", 12)):
        (folder / name).mkdir()
        film = scene(count, 64, 64 + 2 * count)
        for index in range(count):
            PIL.Image.fromarray(film[:, 2 * index : 2 * index + 64]).save(folder / name / f"{index:05}.png")
    return folder


def tally(networks: Networks, tokenizer: Tokenizer, kind: Any = "image") -> Tally:
    return Tally(networks, kind, TokenStats.of(tokenizer.config), "")


def small_nets(folder: Path) -> Networks:
    return Networks(
        inception=load_feature_net(script(Pictures(), folder / "inception.pt"), SMALL_INCEPTION),
        i3d=load_feature_net(script(Clips(), folder / "i3d.pt"), SMALL_I3D),
    )


@needs_data
def test_pictures_and_the_sidecar(tmp_path: Path, capsys: pytest.CaptureFixture[str], continuous: Tokenizer) -> None:
    """Three pictures of the eval split: figures and the latents' sidecar against a direct computation."""
    output = tmp_path / "out" / "plain.json"
    folder = DATA / "images" / "eval"
    arguments = ["tiny-continuous", "--protocol", "plain", "--data", str(folder), "--limit", "3"]
    assert main([*arguments, "--device", "cpu", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(output.read_text())
    (result,) = document["results"]

    originals = [read_image(path, PLAIN) for path in find_items(folder, None, 3).paths]
    tokens = continuous.encode([Image(pixels=picture) for picture in originals])
    pairs = [(a, b.pixels) for a, b in zip(originals, continuous.decode(tokens), strict=True)]
    assert result["values"]["PSNR"] == pytest.approx(np.mean([psnr(a, b) for a, b in pairs]), abs=0.01)
    assert result["values"]["SSIM"] == pytest.approx(np.mean([ssim(a, b) for a, b in pairs]), abs=1e-4)
    assert set(result["values"]) == {"PSNR", "SSIM"}
    assert result["tokens"] == sum(len(item) for item in tokens)

    latents = np.concatenate([item.latents for item in tokens if item.latents is not None]).astype(np.float64)
    sidecar = json.loads((tmp_path / "out" / "tiny-continuous.latents.json").read_text())
    assert set(sidecar) == {"mean", "std", "count", "model", "protocol"}
    np.testing.assert_allclose(sidecar["mean"], latents.mean(0), atol=1e-5)
    np.testing.assert_allclose(sidecar["std"], latents.std(0, ddof=1), rtol=1e-4)
    assert sidecar["count"] == len(latents)
    assert sidecar["model"] == f"tiny-continuous {continuous.revision[:12]}"
    assert sidecar["protocol"] in document["conditions"]

    row = printed.splitlines()[2]
    assert row.startswith(f"| tiny-continuous {continuous.revision[:12]} | plain | images | 3 | ")
    assert row.endswith(f"| {result['values']['PSNR']:.2f} | {result['values']['SSIM']:.4f} | - | - |")
    for words in (
        "protocol plain: short side as it is; centre crop 256 px",
        "n = 3 of 43 files, evenly spaced",
        "left out: rFID: no network given",
        "left out: LPIPS: no network given",
        "posterior means; float32 on cpu",
    ):
        assert words in printed


@pytest.mark.parametrize(("decibels", "wrapped"), [(25, 30.2), (28, 31.3), (30, 32.2)])
def test_large_errors_do_not_wrap_around(decibels: float, wrapped: float, continuous: Tokenizer) -> None:
    """Of uint8 an error d counts as d^2 mod 256; the sizes of the effect are those of the facts."""
    rng = np.random.default_rng(0)
    deviation = 255 * 10 ** (-decibels / 20)
    clip = np.full((2, 128, 128, 3), 128, np.uint8)
    error = rng.laplace(scale=deviation / math.sqrt(2), size=clip.shape)
    back = (clip + error).round().clip(0, 255).astype(np.uint8)
    naive = 10 * math.log10(255**2 / float(np.square(clip - back).mean()))
    assert naive == pytest.approx(wrapped, abs=0.15)
    stills, film = tally(Networks(), continuous), tally(Networks(), continuous, "video")
    stills.pictures(list(clip), list(back))
    film.clip("film", clip, [back[:1], back[1:]])
    for found in (stills.result(), film.result()):
        assert found.values["PSNR"] == pytest.approx(decibels, abs=0.1)


def test_equal_pictures_are_at_distance_zero(tmp_path: Path, continuous: Tokenizer) -> None:
    nets = small_nets(tmp_path)
    shapes = [(32, 48), (48, 32), (32, 48), (32, 32)]
    originals = [scene(index, *shape) for index, shape in enumerate(shapes)]
    same = tally(nets, continuous)
    same.pictures(originals, originals)
    found = same.result()
    assert found.values["rFID"] == pytest.approx(0, abs=1e-6)
    assert found.values["PSNR"] == math.inf
    assert found.values["SSIM"] == pytest.approx(1)
    assert found.warnings["PSNR"] == "4 came back exactly: the mean is infinite"
    assert "4 items for 16 features" in found.warnings["rFID"]
    # And against the same features by hand, where they are not.
    backs = [picture // 2 + 20 for picture in originals]
    other = tally(nets, continuous)
    other.pictures(originals, backs)
    sides = (FeatureStats(), FeatureStats())
    assert nets.inception is not None
    for stats, side in zip(sides, (originals, backs), strict=True):
        for picture in side:
            stats.update(nets.inception.of_pictures(torch.from_numpy(picture).permute(2, 0, 1)[None]))
    wanted = frechet_distance(*sides)
    assert other.result().values["rFID"] == pytest.approx(wanted.total, rel=1e-4)
    assert other.result().parts["rFID"] == pytest.approx((wanted.mean, wanted.covariance), rel=1e-4)
    alone = tally(nets, continuous)
    alone.pictures(originals[:1], backs[:1])
    assert alone.result().missing["rFID"] == "1 item; a Frechet distance needs at least 2"


def test_ssim_is_the_same_on_any_device() -> None:
    a, b = scene(0, 40, 50), scene(1, 40, 50)
    assert ssim_on(torch.device("cpu"), a, b) == pytest.approx(ssim(a, b), abs=1e-12)


def test_lpips_is_per_picture_in_the_range_of_the_network(continuous: Tokenizer) -> None:
    def lpips(seen: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        assert float(wanted.min()) == -1
        return (seen - wanted).abs().mean((1, 2, 3))

    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    found = tally(Networks(lpips=lpips), continuous)
    found.pictures([black, black, black], [black, white, black])
    assert found.result().values["LPIPS"] == pytest.approx(2 / 3)


def test_clips_and_their_frames_as_images(tmp_path: Path, clips: Path, continuous: Tokenizer) -> None:
    """One MSE a clip, means over clips; coded as images of half the sides a clip takes as many tokens."""
    found = find_items(clips, "video")
    assert [path.name for path in found.paths] == ["bear", "swan"]
    nets = small_nets(tmp_path)
    protocol = replace(PLAIN, crop=None)
    results = evaluate(continuous, protocol, found, nets, frames_as_images=True)
    by_hand = []
    for path in found.paths:
        clip = read_clip(path, protocol)
        (back,) = continuous.decode(continuous.encode([Video(frames=clip)]))
        assert isinstance(back, Video)
        by_hand.append((psnr(clip, back.frames), ssim(clip, back.frames)))
    assert results[0].values["PSNR"] == pytest.approx(np.mean([a for a, _ in by_hand]), abs=0.01)
    assert results[0].values["SSIM"] == pytest.approx(np.mean([b for _, b in by_hand]), abs=1e-4)
    assert [result.tokens for result in results] == [(3 + 3) * 16, (10 + 12) * 16, (10 + 12) * 4]
    assert results[1].values["PSNR"] > results[2].values["PSNR"] + 1
    for result in results:
        assert set(result.values) == {"PSNR", "SSIM", "rFID", "rFVD"}
        assert result.values["rFVD"] > 0
        assert "2 items for 16 features" in result.warnings["rFVD"]
        assert (result.items, result.frames, result.lengths) == (2, 22, (10, 12))


def test_short_clips_have_no_rfvd(tmp_path: Path, clips: Path, continuous: Tokenizer) -> None:
    short = replace(PLAIN, frames=8)
    (result,) = evaluate(continuous, short, find_items(clips, "video"), small_nets(tmp_path))
    assert "rFVD" not in result.values
    assert result.missing["rFVD"] == "bear has 8 frames, the network needs 9"


def test_codebook_usage(pictures: Path, discrete: Tokenizer) -> None:
    found = find_items(pictures, None)
    (result,) = evaluate(discrete, PLAIN, found, Networks())
    tokens = discrete.encode([Image(pixels=read_image(path, PLAIN)) for path in found.paths], ["codes"])
    codes = np.concatenate([item.codes for item in tokens if item.codes is not None])
    assert result.stats.codes is not None
    assert result.stats.latents.count == 0
    for book in range(8):
        _, counts = np.unique(codes[:, book], return_counts=True)
        shares = counts / counts.sum()
        assert result.stats.codes.used[book] == pytest.approx(len(counts) / 4096)
        assert result.stats.codes.perplexity[book] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    even = CodeCounts(np.array([[5, 5, 5, 5], [7, 0, 0, 0]]))
    assert even.used == [1, 0.25]
    assert even.perplexity == pytest.approx([4, 1])


def test_networks_from_files(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inception = script(Pictures(), tmp_path / "small.pt")
    arguments = ["tiny-discrete", "--protocol", "imagenet-256", "--data", str(pictures), "--limit", "2"]
    output = tmp_path / "out.json"
    arguments += ["--device", "cpu", "--filter", "bicubic", "--output", str(output), "--inception"]
    assert main([*arguments, str(tmp_path / "nothing.pt")]) == 2
    assert "nothing.pt: no such file. For rFID, Inception v3" in capsys.readouterr().err
    # Under the name of rFID only the published width is taken.
    assert main([*arguments, str(inception)]) == 2
    assert "wanted (2, 2048)" in capsys.readouterr().err
    assert not output.exists()
    monkeypatch.setattr(feature_nets, "INCEPTION", SMALL_INCEPTION)
    assert main([*arguments, str(inception)]) == 0
    printed = capsys.readouterr().out
    assert "the published set has 50,000: not comparable with the table" in printed
    assert "rFID network small.pt (16 features, sha256" in printed
    assert "rFID of images: 2 items for 16 features: the covariance is singular" in printed
    assert "Pillow bicubic" in printed
    assert "codes of images, by codebook, of 4,096, over 512 tokens" in printed
    (result,) = json.loads(output.read_text())["results"]
    parts = result["frechet_parts"]["rFID"]
    assert result["values"]["rFID"] == pytest.approx(parts["mean"] + parts["covariance"])
    assert len(result["codebooks"]["perplexity"]) == 8
    assert not list(tmp_path.glob("*latents*"))


def test_a_mesh_scores_as_in_training(tmp_path: Path, continuous: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "arms.glb").write_bytes(arms_glb())
    protocol = replace(PROTOCOLS["toys4k"], views=2, side=32)
    splats = SplatDecoder.load("tiny-splats")
    items: list[Object] = []

    def kept(*arguments: Any) -> Object:
        items.append(prepare(*arguments))
        return items[-1]

    monkeypatch.setattr(evaluation, "prepare", kept)
    networks = Networks(lpips=lambda seen, wanted: (seen - wanted).abs().mean((1, 2, 3)))
    (result,) = evaluate(continuous, protocol, find_items(tmp_path, "asset"), networks, splats=splats)
    (item,) = items
    shown = evaluation.views_of(splats.net, item, item.decoded)
    by_hand = np.abs(shown.astype(np.float64) - item.pictures.numpy()).mean() / 127.5
    assert result.values["LPIPS"] == pytest.approx(by_hand, rel=1e-3)
    wanted = score(splats.net, items)
    assert result.values["PSNR"] == pytest.approx(wanted["psnr"], abs=0.1)
    assert result.values["SSIM"] == pytest.approx(wanted["ssim"], abs=0.005)
    assert (result.items, result.frames, result.tokens) == (1, 2, len(item.coords))
    assert result.stats.latents.count == len(item.coords)


def test_a_voxel_pack_is_compared_with_its_own_renders(tmp_path: Path, discrete: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    coords = np.stack(np.meshgrid(*[np.arange(28, 36)] * 3, indexing="ij"), -1).reshape(-1, 3).astype(np.int32)
    feats = np.repeat(rng.random((len(coords), 1), np.float32), 768, 1)
    (tmp_path / "cube.safetensors").write_bytes(voxels_bytes(Voxels(coords=coords, feats=feats)))
    protocol = replace(PROTOCOLS["toys4k"], views=2, side=32)
    splats = SplatDecoder.load("tiny-splats")
    (result,) = evaluate(discrete, protocol, find_items(tmp_path, None), Networks(), splats=splats)
    assert result.coding == "voxel packs, against renders of their own voxels"
    stored = np.rint(feats * 255) / np.float32(255)
    (back,) = discrete.decode(discrete.encode([Voxels(coords=coords, feats=stored)], ["codes"]))
    assert isinstance(back, Voxels)
    drawn = []
    for values in (stored, back.feats):
        (found,) = splats.decode([Voxels(coords=coords, feats=values)])
        cameras = sphere_cameras(2, turn=evaluation.TURN)
        views = [
            render(found, torch.from_numpy(pose), torch.from_numpy(k), height=32, width=32).colour
            for pose, k in zip(cameras.world_to_camera, cameras.intrinsics, strict=True)
        ]
        drawn.append([view.clamp(0, 1).numpy() for view in views])
    errors = [np.abs(np.rint(255 * a) - np.rint(255 * b)) for a, b in zip(*drawn, strict=True)]
    by_hand = np.mean([10 * np.log10(255**2 / np.square(error).mean()) for error in errors])
    assert result.values["PSNR"] == pytest.approx(by_hand, abs=0.5)
    (tmp_path / "arms.glb").write_bytes(arms_glb())
    with pytest.raises(ValueError, match=r"cube\.safetensors is a voxel pack among meshes"):
        evaluate(discrete, protocol, find_items(tmp_path, "asset"), Networks(), splats=splats)


def test_items_of_a_folder(tmp_path: Path, pictures: Path) -> None:
    for name in "abcdefghij":
        (tmp_path / name).mkdir()
        PIL.Image.fromarray(scene(0, 32, 32)).save(tmp_path / name / "x.JPEG", "JPEG")
    found = find_items(tmp_path, "image", 5)
    assert [path.parent.name for path in found.paths] == ["a", "c", "e", "g", "i"]
    assert str(found) == "n = 5 of 10 files, evenly spaced"
    assert str(find_items(tmp_path, "image", 99)) == "n = 10"
    (tmp_path / "film.mp4").write_bytes(b"no film")
    with pytest.raises(ValueError, match="holds image and video files"):
        find_items(tmp_path, None)
    with pytest.raises(ValueError, match=r"film\.mp4: "):
        read_clip(tmp_path / "film.mp4", PLAIN)
    with pytest.raises(FileNotFoundError, match="no asset in it"):
        find_items(tmp_path, "asset")
    with pytest.raises(ValueError, match="limit 0; wanted 1 or more"):
        find_items(tmp_path, "image", 0)


def test_a_file_that_cannot_be_read_is_no_smaller_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], continuous: Tokenizer
) -> None:
    PIL.Image.fromarray(scene(0, 32, 32)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    arguments = ["tiny-continuous", "--protocol", "plain", "--data", str(tmp_path), "--device", "cpu"]
    assert main(arguments) == 2
    assert "b.png cannot be read" in capsys.readouterr().err
    PIL.Image.fromarray(scene(0, 12, 32)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png: 0 x 32 pixels at the size of plain; wanted one size, 16 or more"):
        evaluate(continuous, PLAIN, find_items(tmp_path, None), Networks())


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("tiny-continuous", "tiny-continuous.latents.json"),
        ("runs/a/step.0100.safetensors", "step.0100.latents.json"),
        ("so400m-continuous=weights/stage3.pt", "stage3.latents.json"),
        ("so400m-continuous=weights/stage.2/", "stage.2.latents.json"),
        (".", "model.latents.json"),
    ],
)
def test_sidecars_are_named_after_the_file(model: str, name: str) -> None:
    """Two models of one size in one folder would write over each other's."""
    assert sidecar_name(model) == name


def test_a_protocol_of_another_kind(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tiny-continuous", "--protocol", "davis", "--kind", "image", "--data", str(pictures)]
    assert main(arguments) == 2
    assert "davis is a protocol of kind video, not image" in capsys.readouterr().err
