"""Feature networks: called as published, named with every number, never another in their place."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from tests.training.scripted import SMALL_I3D, SMALL_INCEPTION, Clips, NoSwitch, Pictures, script
from training.feature_nets import FVD_FEWEST, I3D, INCEPTION, fvd_frames, load_feature_net, load_networks
from training.perceptual import LPIPS
from training.vgg import VGG16


def test_pictures_go_in_as_bytes(tmp_path: Path) -> None:
    path = script(Pictures(), tmp_path / "inception.pt")
    net = load_feature_net(path, SMALL_INCEPTION)
    pictures = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    found = net.of_pictures(pictures)
    assert found.dtype == torch.float64
    wanted = pictures.double().mean(1).unflatten(1, (4, 8)).unflatten(3, (4, 12)).mean((2, 4)).flatten(1)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-4)
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:12] in str(net)
    assert "rFID network inception.pt (16 features" in str(net)
    with pytest.raises(ValueError, match=r"float32 \(3, 3, 32, 48\); wanted uint8"):
        net.of_pictures(pictures.float())


def test_clips_go_in_as_floats_and_short_ones_do_not(tmp_path: Path) -> None:
    net = load_feature_net(script(Clips(), tmp_path / "i3d.pt"), SMALL_I3D)
    clip = fvd_frames(torch.full((FVD_FEWEST, 40, 60, 3), 255, dtype=torch.uint8))
    assert clip.shape == (3, FVD_FEWEST, 224, 224)
    torch.testing.assert_close(net.of_clips(clip[None]), torch.full((1, 16), 100.0).double())
    with pytest.raises(ValueError, match="T of 9 or more"):
        net.of_clips(clip[None, :, : FVD_FEWEST - 1])


def test_frames_for_fvd() -> None:
    frames = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    torch.testing.assert_close(fvd_frames(frames), (frames.float() / 127.5 - 1).permute(3, 0, 1, 2))
    # Short side to 224, then the middle: the left and right thirds of a wide clip are cut.
    wide = torch.zeros(1, 112, 336, 3, dtype=torch.uint8)
    wide[:, :, :112], wide[:, :, 224:] = 255, 255
    seen = fvd_frames(wide)
    assert seen.shape == (3, 1, 224, 224)
    assert float(seen[:, :, :, 2:-2].max()) == -1


def test_a_missing_file_says_what_it_is_and_how_to_get_it(tmp_path: Path) -> None:
    for form, words in ((INCEPTION, "rFID, Inception v3.*curl .*inception-2015-12-05.pt"), (I3D, "rFVD, I3D.*curl ")):
        with pytest.raises(FileNotFoundError, match=rf"nothing\.pt: no such file\. For {words}"):
            load_feature_net(tmp_path / "nothing.pt", form)
    (tmp_path / "page.pt").write_text("<html>")
    with pytest.raises(ValueError, match=r"page\.pt: no TorchScript file .*curl"):
        load_feature_net(tmp_path / "page.pt", INCEPTION)


def test_another_network_does_not_take_the_name(tmp_path: Path) -> None:
    pictures = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    small = load_feature_net(script(Pictures(), tmp_path / "small.pt"), INCEPTION)
    with pytest.raises(ValueError, match=r"small\.pt gives features \(2, 16\); wanted \(2, 2048\).*rFID"):
        small.of_pictures(pictures)
    other = script(NoSwitch(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: its forward does not take return_features\. For rFID"):
        load_feature_net(other, INCEPTION)
    with pytest.raises(ValueError, match=r"small\.pt: its forward does not take rescale, resize\. For rFVD"):
        load_feature_net(tmp_path / "small.pt", I3D)
    (tmp_path / "other.pt.sha256").write_text("0" * 64)
    with pytest.raises(ValueError, match="checksum"):
        load_feature_net(other, INCEPTION)


def test_lpips_needs_both_files_and_is_that_of_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vgg, heads = VGG16(), LPIPS()
    for weight in heads.heads():
        weight.data.uniform_(0, 1)
    torch.save(vgg.state_dict(), tmp_path / "vgg16.pth")
    half = load_networks(vgg=tmp_path / "vgg16.pth")
    assert half.lpips is None
    assert "LPIPS heads" in half.missing["LPIPS"]
    assert "VGG16 of torchvision" not in half.missing["LPIPS"]
    assert set(half.missing) == {"LPIPS", "rFID", "rFVD"}
    with pytest.raises(FileNotFoundError, match=r"heads\.pth: no such file. For LPIPS, LPIPS heads of VGG: curl"):
        load_networks(vgg=tmp_path / "vgg16.pth", heads=tmp_path / "heads.pth")
    torch.save(heads.state_dict(), tmp_path / "heads.pth")
    both = load_networks(vgg=tmp_path / "vgg16.pth", heads=tmp_path / "heads.pth")
    assert both.lpips is not None
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(both.lpips(a, b), heads.eval()(vgg.eval(), a, b))
    assert both.notes == ("LPIPS network vgg16.pth with heads heads.pth",)
