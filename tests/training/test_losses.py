import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.distributions import Normal, kl_divergence

from model.config import VARIANTS
from tests.training.conftest import SMALL, scene
from training.config import LossConfig
from training.data import Library, training_batch
from training.losses import combine, gaussian_kl, reconstruction
from training.metrics import psnr, ssim


def test_reconstruction_counts_items_alike_and_only_what_is_seen(library: Library) -> None:
    model = VARIANTS["tiny-continuous"]
    packed = training_batch(0, 0, library, SMALL, model)
    decoded = packed.feats + 0.1 * torch.randn(packed.feats.shape, generator=torch.Generator().manual_seed(0))
    l1, log_mse = reconstruction(decoded, packed, model, 1e-3)
    maes, logs = [], []
    for start, stop in zip(packed.starts, packed.starts[1:], strict=False):
        values = 3072 if packed.moving[start] else 768
        off = (decoded - packed.feats)[start:stop, :values]
        maes.append(off.abs().mean())
        logs.append((off.square().mean() + 1e-3).log())
    assert float(l1) == pytest.approx(float(torch.stack(maes).mean()), rel=1e-5)
    assert float(log_mse) == pytest.approx(float(torch.stack(logs).mean()), rel=1e-5)
    unseen = decoded.clone()
    unseen[~packed.moving, 768:] = 9
    assert torch.equal(reconstruction(unseen, packed, model, 1e-3)[1], log_mse)


def test_kl_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(5, 48, generator=generator), torch.randn(5, 48, generator=generator)
    wanted = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(1).mean()
    assert float(gaussian_kl(mean, logvar)) == pytest.approx(float(wanted), rel=1e-5)


def test_the_terms_are_weighted() -> None:
    config = LossConfig(l1=2, log_mse=3, kl=5)
    assert float(combine(torch.tensor(1.0), torch.tensor(10.0), torch.tensor(100.0), config).total) == 532


def test_psnr_and_ssim_are_those_of_skimage() -> None:
    a = scene(0, 70, 90)
    b = np.clip(a + np.random.default_rng(0).normal(size=a.shape) * 12, 0, 255).astype(np.uint8)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-9)
    wanted = structural_similarity(
        a, b, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim(a, b) == pytest.approx(wanted, abs=1e-6)
    assert ssim(np.stack([a, a]), np.stack([b, a])) == pytest.approx((wanted + 1) / 2, abs=1e-6)
