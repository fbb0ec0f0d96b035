from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import VARIANTS
from tests.training.conftest import SMALL, scene
from training.data import (
    Library,
    centre_crop,
    is_validation,
    load_library,
    picture_paths,
    random_clip,
    random_crop,
    random_sheet,
    training_batch,
)

MODEL = VARIANTS["tiny-continuous"]


def test_a_batch_depends_on_seed_and_step_alone(library: Library) -> None:
    first = training_batch(3, 5, library, SMALL, MODEL)
    training_batch(3, 6, library, SMALL, MODEL)
    again = training_batch(3, 5, library, SMALL, MODEL)
    assert torch.equal(first.feats, again.feats)
    assert torch.equal(first.coords, again.coords)
    other = training_batch(4, 5, library, SMALL, MODEL)
    assert not torch.equal(first.feats, other.feats)


def test_a_batch_has_images_clips_and_sheets(library: Library) -> None:
    packed = training_batch(0, 0, library, SMALL, MODEL)
    lengths = np.diff(packed.starts).tolist()
    assert lengths == [12] * 4 + [18] * 2 + [64]
    assert packed.moving.tolist() == [False] * 48 + [True] * 36 + [False] * 64
    assert packed.feats.abs().max() <= 1
    assert (packed.feats[~packed.moving, 768:] == 0).all()


def test_crops_and_clips_have_the_size_asked_for(library: Library) -> None:
    rng = np.random.default_rng(0)
    film = np.stack([scene(seed, 40, 200) for seed in range(30)])
    filmed = Library(pictures=library.pictures, films=(film,))
    for height, width in ((16, 16), (48, 80), (256, 128), (400, 400)):
        crop = random_crop(rng, library, height, width)
        assert crop.shape == (height, width, 3)
        assert crop.dtype == np.uint8
    for _ in range(6):
        assert random_clip(rng, filmed, SMALL, 8, 64).shape == (8, 64, 64, 3)
        sheet = random_sheet(rng, library)
        assert sheet.coords.min() >= 0
        assert sheet.coords.max() < 64
        assert len(np.unique(sheet.coords, axis=0)) == 64


def test_pictures_held_aside_are_not_trained_on(data: Path, library: Library) -> None:
    paths = picture_paths(data / "images" / "train")
    held = [path for path in paths if is_validation(path)]
    assert 0 < len(held) < len(paths) / 2
    assert len(library.pictures) == len(paths) - len(held)


def test_a_folder_without_pictures_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no images"):
        load_library(tmp_path)


def test_centre_crop_keeps_whole_patches() -> None:
    assert centre_crop(np.zeros((300, 100, 3), np.uint8), 256).shape == (256, 96, 3)
    assert centre_crop(np.zeros((5, 600, 300, 3), np.uint8), 256).shape == (5, 256, 256, 3)
