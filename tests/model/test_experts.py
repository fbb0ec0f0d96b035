from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from media.types import Image
from model import Tokenizer, fsq
from model.config import VARIANTS, ModelConfig
from model.errors import UnsupportedError
from model.experts import DigitExperts, Experts
from model.linear_path import LinearPath
from training.expert_fit import expert_losses, fit_digits, fit_experts
from training.metrics import psnr

SMALL = replace(VARIANTS["tiny-continuous"], latent_channels=6, experts=4, marks=2, components=20)


def some_experts(seed: int = 0) -> Experts:
    generator = torch.Generator().manual_seed(seed)
    experts = Experts(SMALL).requires_grad_(False)
    experts.centre.normal_(generator=generator)
    experts.rows.copy_(torch.linalg.qr(torch.randn(4, 20, 4, generator=generator)).Q.mT)
    experts.scale.copy_(torch.rand(4, 4, generator=generator) + 0.5)
    return experts


def test_the_expert_that_loses_least_is_taken_and_named() -> None:
    experts = some_experts()
    patches = torch.randn(200, 20, generator=torch.Generator().manual_seed(1))
    latents = experts.encode(patches)
    wanted = []
    for patch in patches.double():
        losses = []
        for number in range(4):
            centre, rows = experts.centre[number].double(), experts.rows[number].double()
            losses.append((patch - centre - rows.T @ (rows @ (patch - centre))).square().sum())
        wanted.append(int(torch.stack(losses).argmin()))
    assert len(set(wanted)) == 4
    assert experts.choice(latents).tolist() == wanted
    error = (experts.decode(latents) - patches).square().sum(1)
    assert torch.allclose(error, expert_losses(experts, patches).min(1).values, atol=1e-4)


def test_what_an_expert_can_say_comes_back() -> None:
    experts = some_experts()
    patches = experts.centre[2] + torch.randn(50, 4, generator=torch.Generator().manual_seed(2)) @ experts.rows[2]
    latents = experts.encode(patches)
    assert (experts.choice(latents) == 2).all()
    assert torch.allclose(experts.decode(latents), patches, atol=1e-5)


def test_rows_that_half_precision_bent_are_straightened_and_no_others() -> None:
    exact, bent, free = some_experts(), some_experts(), some_experts()
    bent.rows.copy_(bent.rows.half().float())
    assert (bent.rows @ bent.rows.mT - torch.eye(4)).abs().max() > 1e-4
    bent.straighten()
    assert (bent.rows @ bent.rows.mT - torch.eye(4)).abs().max() < 1e-6
    assert torch.allclose(bent.rows, exact.rows, atol=3e-4)
    assert not bent.rows.requires_grad
    before = exact.rows.clone()
    exact.straighten()
    assert torch.equal(exact.rows, before)
    free.rows.normal_()
    before = free.rows.clone()
    free.straighten()
    assert torch.equal(free.rows, before)


@pytest.mark.parametrize("name", ["tiny-continuous", "tiny-discrete"])
def test_bundled_experts_are_orthonormal(name: str) -> None:
    path = Tokenizer.load(name, device="cpu", dtype="bfloat16").net.linear_path
    for experts in (path.still_experts, path.moving_experts):
        wanted = torch.eye(experts.coefficients).expand(experts.count, -1, -1)
        torch.testing.assert_close(experts.rows @ experts.rows.mT, wanted, rtol=0, atol=2e-6)


def test_marks_have_unit_variance_and_bear_noise() -> None:
    experts = some_experts()
    marks = experts.marks_of(torch.arange(4))
    assert torch.allclose(marks.mean(0), torch.zeros(2), atol=1e-6)
    assert torch.allclose(marks.var(0, correction=0), torch.ones(2), atol=1e-6)
    latents = torch.cat([torch.zeros(4, 4), marks], dim=1)
    for shift in (-0.49, 0.49, 0.0):
        assert experts.choice(latents + shift * experts.mark_step).tolist() == [0, 1, 2, 3]
    assert experts.choice(100 * latents).tolist() == [0, 1, 2, 3]


@torch.no_grad()
@pytest.mark.parametrize("codes", [False, True])
def test_a_choice_does_not_depend_on_what_is_beside_it(codes: bool) -> None:
    """Across blocks and chunks, and without the batch-invariant mode."""
    experts = digit_experts()[0] if codes else some_experts()
    patches = torch.randn(1300, 20, generator=torch.Generator().manual_seed(3))
    latents = experts.encode(patches)
    for rows in (slice(0, 1), slice(3, 20), slice(120, 140), slice(1000, 1100), slice(1299, 1300)):
        assert torch.equal(experts.encode(patches[rows]), latents[rows])
    experts.fixed = True
    back = experts.decode(latents)
    for rows in (slice(0, 1), slice(120, 140), slice(1000, 1100)):
        assert torch.equal(experts.decode(latents[rows]), back[rows])


@pytest.mark.parametrize("name", ["tiny-continuous", "tiny-discrete"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_smaller_dtype_costs_little_on_a_bright_picture(name: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    pixels = np.clip(np.linspace(205, 250, 64)[:, None, None] + rng.normal(0, 3, (64, 96, 3)), 0, 255).astype(np.uint8)
    scores = []
    for one in ("float32", dtype):
        model = Tokenizer.load(name, device="cpu", dtype=one)
        kind = {"codes"} if "codes" in model.outputs else {"latents"}
        scores.append(psnr(pixels, model.decode(model.encode([Image(pixels=pixels)], kind))[0].pixels))
    assert scores[1] > scores[0] - 0.15


def test_gradients_are_those_of_the_chosen_expert() -> None:
    experts = some_experts().double()

    def there_and_back(patches: Tensor) -> Tensor:
        return experts.decode(experts.encode(patches))

    patches = torch.randn(9, 20, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(there_and_back, (patches,))


def test_the_fit_finds_subspaces_that_are_there() -> None:
    true = some_experts(5)
    generator = torch.Generator().manual_seed(6)
    kinds = torch.randint(4, (4000,), generator=generator)
    spread = torch.randn(4000, 4, generator=generator) * torch.tensor([3.0, 2.5, 2.0, 1.5])
    patches = true.centre[kinds] + torch.einsum("nk,nkd->nd", spread, true.rows[kinds])
    patches += 0.05 * torch.randn(patches.shape, generator=generator)
    found = some_experts(7)
    errors = fit_experts(found, patches, torch.ones(4000), seed=0, rounds=40)
    assert errors[-1] < errors[0]
    assert errors[-1] < 2 * 20 * 0.05**2
    assert torch.allclose(found.rows @ found.rows.mT, torch.eye(4).expand(4, 4, 4), atol=1e-5)
    # Unit variance, and an expert that got nothing would stand out.
    latents = found.encode(patches)[:, :4]
    assert torch.allclose(latents.var(0), torch.ones(4), atol=0.2)
    assert found.choice(found.encode(patches)).bincount(minlength=4).min() > 500


def test_a_correction_leaves_the_marks_alone_and_without_noise() -> None:
    path = LinearPath(SMALL)
    latents = torch.randn(3, 6)
    mean, logvar = path.correct(latents, torch.ones(3, 6), torch.zeros(3, 6))
    assert torch.equal(mean[:, :4], latents[:, :4] + 1)
    assert torch.equal(mean[:, 4:], latents[:, 4:])
    assert not logvar[:, :4].any()
    assert path.still_experts is not None
    assert 6 * (logvar[:, 4:] / 2).exp().max() < path.still_experts.mark_step / 2


@pytest.mark.parametrize(("experts", "marks"), [(5, 2), (8, 2), (4, 0)])
def test_experts_that_marks_cannot_name_are_refused(experts: int, marks: int) -> None:
    with pytest.raises(UnsupportedError, match=f"{experts} experts with {marks} marks"):
        replace(SMALL, experts=experts, marks=marks)


def test_config_of_an_older_file_has_no_experts() -> None:
    values = {**VARIANTS["so400m-continuous"].to_json(), "digits": False}
    for name in ("experts", "marks", "components"):
        del values[name]
    assert ModelConfig.from_json(values) == VARIANTS["so400m-continuous"]
    with pytest.raises(ValueError, match="older version"):
        ModelConfig.from_json({**values, "digits": True})


CODES = replace(SMALL, bottleneck="fsq", codebooks=1, experts=4, marks=1)


def digit_experts() -> tuple[DigitExperts, Tensor]:
    """Fitted to kinds of patches of which each has a strong direction; with the patches."""
    true = some_experts(5)
    generator = torch.Generator().manual_seed(6)
    kinds = torch.randint(4, (4000,), generator=generator)
    spread = torch.randn(4000, 4, generator=generator) * torch.tensor([9.0, 3.0, 1.0, 0.3])
    patches = true.centre[kinds] + torch.einsum("nk,nkd->nd", spread, true.rows[kinds])
    experts = DigitExperts(CODES).requires_grad_(False)
    fit_experts(experts, patches, torch.ones(4000), seed=0, rounds=12)
    before = float((experts.decode(values_of(experts, patches)) - patches).square().sum(1).mean())
    errors = fit_digits(experts, patches, torch.ones(4000))
    assert errors[-1] < before / 2
    return experts, patches


def values_of(experts: DigitExperts, patches: Tensor) -> Tensor:
    return fsq.quantize(experts.levels_of(experts.encode(patches)))


def test_codes_give_back_the_middle_of_the_cell_that_a_coefficient_is_in() -> None:
    experts, patches = digit_experts()
    counts = (experts.cells().log2() / 2).round()
    assert (counts.sum(1) == 5).all()
    assert (counts[:, 0] >= 2).all()
    latents = experts.encode(patches)
    chosen = experts.choice(latents)
    back = experts.decode(fsq.quantize(experts.levels_of(latents)))
    # The same by hand: the coefficients of what comes back, in cells, are whole numbers next to those that went in.
    again = torch.einsum("nkd,nd->nk", experts.rows[chosen], back - experts.centre[chosen]) / experts.scale[chosen]
    cells = again / experts.step[chosen]
    pixels = experts.step[chosen] * experts.scale[chosen]
    assert ((cells - cells.round()) * pixels).abs().max() < 1e-4
    inside = (latents[:, :5] / experts.step[chosen]).abs() < experts.cells()[chosen] / 2 - 1
    assert inside.any()
    assert ((again - latents[:, :5]).abs() / experts.step[chosen] * (pixels > 1e-2))[inside].max() <= 0.5 + 1e-3
    # And what the choice was made by is what comes back.
    wanted = expert_losses(experts, patches, given_back=True).min(1).values
    assert torch.allclose((back - patches).square().sum(1), wanted, rtol=1e-3, atol=1e-3)


def test_every_code_is_decoded_and_names_its_expert() -> None:
    experts, _ = digit_experts()
    generator = torch.Generator().manual_seed(8)
    codes = torch.randint(4096, (64, 1), generator=generator, dtype=torch.int32)
    values = fsq.codes_to_values(codes, 6)
    back = experts.decode(values)
    assert torch.isfinite(back).all()
    assert torch.equal((values[:, 5] * 2 + 2).long(), codes[:, 0].long() // 4**5)
    for row, number in zip(back, (values[:, 5] * 2 + 2).long().tolist(), strict=True):
        left = row - experts.centre[number]
        assert torch.allclose(experts.rows[number].T @ (experts.rows[number] @ left), left, atol=1e-4)


def test_a_coefficient_near_0_comes_back_as_0() -> None:
    experts, _ = digit_experts()
    noise = torch.rand(40, 5, generator=torch.Generator().manual_seed(9)) - 0.5
    for number in range(4):
        marks = experts.marks_of(torch.full((40,), number))
        latents = torch.cat([0.99 * noise * experts.step[number], marks], dim=1)
        back = experts.decode(fsq.quantize(experts.levels_of(latents)))
        assert torch.allclose(back, experts.centre[number].expand_as(back), atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"experts": 1, "marks": 1}, {"components": 0}, {"linear_path": False}, {"experts": 0}, {"marks": 6}]
)
def test_experts_that_cannot_work_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(UnsupportedError, match=r"experts|marks"):
        replace(SMALL, **changes)


def test_codes_want_marks_that_are_digits() -> None:
    with pytest.raises(UnsupportedError, match="marks of 2 values; wanted 4"):
        replace(VARIANTS["tiny-discrete"], experts=4, marks=2)
