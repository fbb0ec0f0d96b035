"""PSNR and SSIM, against scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from model.errors import ShapeError
from model.image_metrics import psnr, ssim


def pair(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(shape))
    first = rng.random(shape)
    return first, np.clip(first + rng.normal(scale=0.1, size=shape), 0, 1)


@pytest.mark.parametrize("size", [(11, 11), (32, 47)])
def test_both_are_those_of_scikit_image(size: tuple[int, int]) -> None:
    first, second = pair(2, *size, 3)
    got = psnr(torch.from_numpy(first), torch.from_numpy(second)), ssim(*map(torch.from_numpy, (first, second)))
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        assert got[0][number].item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1))
        wanted = structural_similarity(
            a, b, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1
        )
        assert got[1][number].item() == pytest.approx(wanted, abs=1e-9)


def test_float32_is_close_to_float64_and_one_picture_gives_one_number() -> None:
    first, second = (torch.from_numpy(picture) for picture in pair(64, 64, 3))
    narrow = ssim(first.float(), second.float())
    assert narrow.shape == ()
    assert narrow.item() == pytest.approx(ssim(first, second).item(), abs=1e-5)


def test_equal_pictures() -> None:
    picture = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    assert ssim(picture, picture).tolist() == pytest.approx([1, 1])
    assert psnr(picture, picture).isinf().all()


def test_gradients() -> None:
    first, second = (torch.from_numpy(picture) for picture in pair(12, 13, 3))
    first.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: (psnr(x, second), ssim(x, second)), (first,))


def test_what_are_no_two_pictures_is_refused() -> None:
    picture = torch.zeros(16, 16, 3)
    for other, message in (
        (torch.zeros(16, 17, 3), r"\[16, 16, 3\] and \[16, 17, 3\]"),
        (picture.double(), "torch.float64; wanted floats of one dtype"),
    ):
        for metric in (psnr, ssim):
            with pytest.raises(ShapeError, match=message):
                metric(picture, other)
    with pytest.raises(ShapeError, match="at least 11"):
        ssim(picture[:10], picture[:10])
