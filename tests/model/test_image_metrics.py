"""PSNR and SSIM against scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from model.image_metrics import psnr, ssim


@pytest.mark.parametrize("noise", [0.01, 0.2])
def test_they_agree_with_scikit_image(noise: float) -> None:
    chance = np.random.default_rng(0)
    a = np.clip(np.cumsum(chance.normal(0, 0.1, (40, 33, 3)), axis=0) + 0.5, 0, 1)
    b = np.clip(a + chance.normal(0, noise, a.shape), 0, 1)
    assert float(psnr(torch.from_numpy(a), torch.from_numpy(b))) == pytest.approx(
        peak_signal_noise_ratio(a, b, data_range=1), abs=1e-9
    )
    # scikit-image's own mean leaves out a border of five, which is where a window does not fit.
    wanted = structural_similarity(
        a, b, data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert float(ssim(torch.from_numpy(a), torch.from_numpy(b))) == pytest.approx(wanted, abs=1e-6)


def test_equal_pictures() -> None:
    a = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0))
    assert torch.isinf(psnr(a, a))
    assert float(ssim(a, a)) == pytest.approx(1, abs=1e-5)
