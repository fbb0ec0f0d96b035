"""Sentences for class names."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.prompts import CLIP, PROMPTS, SHORT, get_prompts, read_prompts


def test_the_published_sets() -> None:
    assert len(CLIP) == len(set(CLIP)) == 80
    assert set(SHORT) <= set(CLIP)
    assert len(SHORT) == 7
    # A few of every form that the eighty have.
    for prompt in (
        "a jpeg corrupted photo of the {}.",
        "a photo of a hard to see {}.",
        "a photo of many {}.",
        "a rendition of a {}.",
        "graffiti of the {}.",
        "itap of my {}.",
        "the embroidered {}.",
        "the {} in a video game.",
    ):
        assert prompt in CLIP
    assert all(prompt.count("{}") == 1 for prompts in PROMPTS.values() for prompt in prompts)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a photo of a {}.\n\nthe {}\n")
    assert read_prompts(path) == get_prompts(str(path)) == ("a photo of a {}.", "the {}")
    path.write_text("a photo\n")
    with pytest.raises(ValueError, match=r"'a photo' has no single \{\}"):
        read_prompts(path)
    with pytest.raises(ValueError, match="prompts 'best'; there are clip, short, plain, and no file of that name"):
        get_prompts("best")
