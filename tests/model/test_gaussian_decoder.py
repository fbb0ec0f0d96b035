"""Features to Gaussians: windows, cap, layout, activations, loading. The published case is in tests/conformance."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from media.ply import encode_ply
from model.config import GaussianConfig
from model.errors import RangeError, ShapeError, UnsupportedError, WeightsError
from model.gaussian_decoder import GaussianDecoder, position_table, sort_into_windows
from model.splats import Splats, perturbation, rotation_matrices
from model.verify import rowwise_error
from model.weights import load_gaussian_decoder
from tests.media.test_ply import read
from tests.paths import CONFORMANCE, needs_conformance

SMALL = GaussianConfig(feature_channels=24, width=48, blocks=4, heads=3, mlp=96)


@pytest.fixture(scope="module")
def decoder() -> GaussianDecoder:
    torch.manual_seed(3)
    net = GaussianDecoder(SMALL)
    for parameter in net.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
    return net.eval().requires_grad_(False)


def voxels(count: int = 150, items: int = 2, *, span: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features and coordinates of items that are dense enough for windows of many tokens."""
    rng = np.random.default_rng(seed)
    coords = np.concatenate(
        [
            np.c_[np.full(count, item), np.stack(np.unravel_index(rng.choice(span**3, count, False), (span,) * 3), 1)]
            for item in range(items)
        ]
    )
    return torch.from_numpy(rng.normal(size=(len(coords), 24)).astype(np.float32)), torch.from_numpy(coords)


@needs_conformance
def test_published_names_and_shapes() -> None:
    with torch.device("meta"):
        net = GaussianDecoder(GaussianConfig())
    ours = {name: str(list(tensor.shape)) for name, tensor in net.state_dict().items()}
    rows = [line.split("\t") for line in (CONFORMANCE / "keys_gs.txt").read_text().splitlines() if line.strip()]
    assert ours == {name: shape for name, shape, _ in rows}
    assert len(ours) == 76
    assert sum(parameter.numel() for parameter in net.parameters()) == 85_887_424


def test_an_untrained_decoder_fills_every_cell_evenly_with_faint_grey() -> None:
    coords = torch.tensor([[0, 3, 20, 50], [0, 63, 0, 7]])
    net = GaussianDecoder(SMALL)
    splats = net.splats(net(torch.randn(2, 24), coords), coords)
    place = splats.positions().detach().reshape(2, 32, 3)
    low = coords[:, None, 1:] / 64 - 0.5
    inside = (place - low) * 64
    assert inside.min() >= 0
    assert inside.max() <= 1
    for axis in range(3):
        counts = torch.histc(inside[0, :, axis], 4, 0, 1)
        assert counts.min() >= 6, "a quarter of the cell holds about a quarter of its 32 Gaussians"
    assert splats.scales().detach() == pytest.approx(math.hypot(0.004, 0.0009), rel=1e-5)
    assert splats.opacities().detach() == pytest.approx(0.1, rel=1e-5)
    assert splats.colours().detach() == pytest.approx(0.5)
    assert torch.equal(splats.rotations().detach(), torch.tensor([1.0, 0, 0, 0]).expand(64, 4))


def test_perturbation_is_the_published_one() -> None:
    published = [
        [-0.8047, -0.8047, -0.8047],
        [-0.7332, 0, -0.2260],
        [-0.6675, -0.3466, 0.2260],
        [-0.6065, 0.3466, -0.5743],
    ]
    assert perturbation(GaussianConfig())[:4].numpy() == pytest.approx(np.array(published), abs=5e-5)


def test_positions_reach_three_quarters_of_a_cell_from_the_centre_and_no_further() -> None:
    net, coords = GaussianDecoder(SMALL), torch.tensor([[0, 3, 20, 50]])
    outputs = torch.zeros(1, 448)
    outputs[0, :96:3] = 1e4  # x of every offset
    place = net.splats(outputs, coords).positions().detach()
    assert place[:, 0] == pytest.approx((3.5 + 0.75) / 64 - 0.5, abs=1e-7)
    assert (place[:, 1:] - (torch.tensor([20.5, 50.5]) / 64 - 0.5)).abs().max() < 0.5 / 64 + 1e-7


def test_outputs_are_laid_out_in_blocks_with_their_multipliers() -> None:
    net, coords = GaussianDecoder(SMALL), torch.tensor([[0, 1, 2, 3], [0, 4, 5, 6]])
    splats = net.splats(torch.arange(2 * 448).float().reshape(2, 448), coords)
    second = 448.0
    assert splats.features_dc[33].tolist() == [second + 96 + 3, second + 97 + 3, second + 98 + 3]
    assert splats.scaling[1].tolist() == [195, 196, 197]
    assert splats.rotation[1].tolist() == pytest.approx([29.2, 29.3, 29.4, 29.5])
    assert splats.opacity[31].tolist() == [447]


def test_position_table_has_all_sines_then_all_cosines_of_x_then_y_then_z() -> None:
    table = position_table(torch.tensor([[5, 0, 63]]), 50)[0]
    rates = [10000 ** (-i / 8) for i in range(8)]
    wanted = [f(p * rate) for p in (5, 0, 63) for f in (math.sin, math.cos) for rate in rates]
    assert table.tolist() == pytest.approx([*wanted, 0, 0], abs=5e-6)


@pytest.mark.parametrize("shift", [0, 4])
def test_windows_are_cubes_of_one_item(shift: int) -> None:
    _, coords = voxels(400, 3, span=64)
    groups: dict[Any, list[int]] = defaultdict(list)
    for row, (item, *place) in enumerate(coords.tolist()):
        groups[(item, *((p + shift) // 8 for p in place))].append(row)
    windows = sort_into_windows(coords, SMALL, shift)
    found = [part.tolist() for part in windows.order.split(windows.lengths)]
    assert sorted(found) == sorted(groups.values())
    assert torch.equal(windows.order[windows.back], torch.arange(len(coords)))


def test_items_do_not_meet_and_the_order_of_voxels_is_irrelevant(decoder: GaussianDecoder) -> None:
    feats, coords = voxels()
    together = decoder(feats, coords)
    for item in (0, 1):
        own = coords[:, 0] == item
        assert rowwise_error(decoder(feats[own], coords[own]).numpy(), together[own].numpy()) < 1e-5
    order = torch.randperm(len(feats), generator=torch.Generator().manual_seed(1))
    assert rowwise_error(decoder(feats[order], coords[order]).numpy(), together[order].numpy()) < 1e-5


def test_odd_blocks_see_across_the_borders_of_even_ones(decoder: GaussianDecoder) -> None:
    coords = torch.tensor([[0, 7, 7, 7], [0, 8, 8, 8], [0, 24, 24, 24]])
    feats = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    before = decoder(feats, coords)
    feats[1] += 1
    moved = (decoder(feats, coords) - before).abs().amax(dim=1)
    assert moved[0] > 1e-3, "a neighbour in the next window is reached through a shifted block"
    assert moved[2] == 0, "a far voxel is not"


def test_the_published_exception_needs_eight_tokens_in_every_window(decoder: GaussianDecoder) -> None:
    corners = torch.cartesian_prod(*[torch.arange(2)] * 3)
    eight = torch.cat([torch.zeros(8, 1, dtype=torch.int64), corners + 1], dim=1)
    feats = torch.randn(9, 24, generator=torch.Generator().manual_seed(0)) * 5
    capped, uncapped = (decoder(feats[:8], eight, uncap_eights=flag) for flag in (False, True))
    assert (capped - uncapped).abs().max() > 1e-3
    assert torch.equal(decoder(feats[:8], eight), capped)
    nine = torch.cat([eight, torch.tensor([[0, 40, 40, 40]])])
    assert torch.equal(decoder(feats, nine, uncap_eights=True), decoder(feats, nine))


def test_bfloat16_stays_near_float32_and_gives_float32(decoder: GaussianDecoder, tmp_path: Path) -> None:
    save_file(decoder.state_dict(), tmp_path / "gs.safetensors")
    narrow = load_gaussian_decoder(tmp_path / "gs.safetensors", SMALL, dtype=torch.bfloat16)
    feats, coords = voxels()
    outputs = narrow(feats, coords)
    assert outputs.dtype == torch.float32
    assert rowwise_error(outputs.numpy(), decoder(feats, coords).numpy()) < 0.3
    assert rowwise_error(outputs.numpy(), decoder(feats, coords).numpy()) > 1e-4


def test_every_parameter_gets_a_gradient(decoder: GaussianDecoder) -> None:
    net = GaussianDecoder(SMALL)
    net.load_state_dict(decoder.state_dict())
    feats, coords = voxels()
    splats = net.splats(net(feats, coords), coords)
    (splats.positions().square().sum() + splats.covariances().sum() + splats.colours().sum()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_covariance_is_that_of_the_turned_axes() -> None:
    quarter_about_z = torch.tensor([[math.sqrt(0.5), 0, 0, math.sqrt(0.5)]])
    assert rotation_matrices(quarter_about_z)[0].numpy() == pytest.approx(
        np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]]), abs=1e-6
    )
    turns = rotation_matrices(torch.nn.functional.normalize(torch.randn(50, 4, dtype=torch.float64)))
    assert (turns @ turns.transpose(1, 2)).numpy() == pytest.approx(np.tile(np.eye(3), (50, 1, 1)), abs=1e-12)
    assert torch.linalg.det(turns).numpy() == pytest.approx(1)
    splats = Splats(
        xyz01=torch.zeros(1, 3),
        features_dc=torch.zeros(1, 3),
        scaling=torch.tensor([[10.0, 6.0, 4.0]]),
        rotation=quarter_about_z - torch.tensor([1.0, 0, 0, 0]),
        opacity=torch.zeros(1, 1),
        config=SMALL,
    )
    own = splats.scales()[0].square()
    assert splats.covariances()[0].numpy() == pytest.approx(torch.diag(own[[1, 0, 2]]).numpy(), abs=1e-5)


def test_written_ply_holds_what_the_activations_say(decoder: GaussianDecoder) -> None:
    feats, coords = voxels(20, 1)
    splats = decoder.splats(decoder(feats, coords), coords)
    columns = read(encode_ply(splats.to_record()))
    assert len(columns["x"]) == 20 * 32
    place = np.stack([columns[name] for name in "xyz"], axis=1)
    assert np.array_equal(place, splats.positions().numpy())
    cells = np.floor((place.reshape(20, 32, 3).mean(axis=1) + 0.5) * 64)
    assert np.array_equal(cells, coords[:, 1:].numpy()), "x stays x, z is up"
    assert 1 / (1 + np.exp(-columns["opacity"])) == pytest.approx(splats.opacities()[:, 0].numpy(), abs=1e-6)
    assert np.exp(columns["scale_2"]) == pytest.approx(splats.scales()[:, 2].numpy(), rel=1e-5)
    turn = np.stack([columns[f"rot_{i}"] for i in range(4)], axis=1)
    assert turn / np.linalg.norm(turn, axis=1, keepdims=True) == pytest.approx(splats.rotations().numpy(), abs=1e-6)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_load_strictly_but_for_the_loss_network(decoder: GaussianDecoder, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"gs{suffix}"

    def load_with(**changes: Tensor | None) -> GaussianDecoder:
        state = {**decoder.state_dict(), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
        kept = {name: tensor for name, tensor in state.items() if tensor is not None}
        if suffix == ".pt":
            torch.save(kept, file)
        else:
            save_file(kept, file)
        return load_gaussian_decoder(file, SMALL)

    loaded = load_with(lpips_loss__net__lin0=torch.zeros(3))
    assert not loaded.training
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with pytest.raises(WeightsError, match=r"1 missing \(first out_layer.bias\)"):
        load_with(out_layer__bias=None)
    with pytest.raises(WeightsError, match=r"1 missing \(first offset_perturbation\)"):
        load_with(offset_perturbation=None)
    with pytest.raises(WeightsError, match=r"1 unknown \(first head.weight\)"):
        load_with(head__weight=torch.zeros(1))
    with pytest.raises(WeightsError, match=r"input_layer.weight has shape \[48, 25\]; wanted \[48, 24\]"):
        load_with(input_layer__weight=torch.zeros(48, 25))


def test_what_is_no_voxel_set_is_refused(decoder: GaussianDecoder) -> None:
    feats, coords = voxels(10, 1)
    for bad_feats, bad_coords, message in (
        (feats[:, :20], coords, r"feats torch.float32 \(10, 20\); wanted floats \[N, 24\]"),
        (feats.long(), coords, "feats torch.int64"),
        (feats, coords[:9], r"\(9, 4\) for 10 voxels"),
        (feats, coords.float(), "wanted integers"),
        (feats[:0], coords[:0], "N > 0"),
    ):
        with pytest.raises(ShapeError, match=message):
            decoder(bad_feats, bad_coords)
    for value in (-1, 64):
        spoilt = coords.clone()
        spoilt[3, 2] = value
        with pytest.raises(RangeError, match=f"coords of .*{value}"):
            decoder(feats, spoilt)


def published(**changes: Any) -> dict[str, Any]:
    splats = {
        "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
        "perturb_offset": True,
        "voxel_size": 1.5,
        "num_gaussians": 32,
        "3d_filter_kernel_size": 0.0009,
        "scaling_bias": 0.004,
        "opacity_bias": 0.1,
        "scaling_activation": "softplus",
    }
    sizes = {"resolution": 64, "model_channels": 768, "latent_channels": 768, "num_blocks": 12, "num_heads": 12}
    rest = {"mlp_channels": 3072, "attn_mode": "swin", "window_size": 8, "representation_config": splats}
    return {**sizes, **rest, **changes}


def test_published_config_is_the_default_and_others_are_refused() -> None:
    assert GaussianConfig.from_published(published()) == GaussianConfig()
    other = {**published()["representation_config"], "scaling_activation": "exp"}
    for config, message in (
        (published(attn_mode="full"), "attn_mode 'full'; supported: 'swin'"),
        (published(representation_config=other), "scaling_activation 'exp'"),
        (published(num_heads=7), "width 768 does not split into 7 heads"),
        (published(window_size=5), "window 5"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            GaussianConfig.from_published(config)
