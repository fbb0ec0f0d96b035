from pathlib import Path

import numpy as np
import pytest
import torch

from model import Tokenizer
from model.errors import RangeError, UnsupportedError, WeightsError
from model.words import WordTable


def table() -> WordTable:
    vectors = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.5]])
    return WordTable(["bird", "fish", "berries"], vectors, torch.tensor([0.0, 0.0, 0.0]))


def test_a_text_is_the_mean_of_its_words_whatever_their_case_and_what_stands_between() -> None:
    words = table()
    found = words.embed(["A photo of a Bird, and FISH!", "fish bird"])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], torch.tensor([1.0, 2.0, 0.0]) / 5**0.5)
    torch.testing.assert_close(words.embed(["birds"]), words.embed(["bird"]))


def test_a_text_without_a_known_word_is_refused_by_name() -> None:
    with pytest.raises(RangeError, match="'the of': no word"):
        table().embed(["bird", "the of"])
    with pytest.raises(RangeError, match=r"^'(xyz ){12}xy'\.\.\.: no word"):
        table().embed(["xyz " * 200])


def test_a_table_comes_back_from_its_file_within_half_a_step(tmp_path: Path) -> None:
    before = WordTable(["bird", "fish"], torch.randn(2, 48), torch.randn(48))
    before.save(tmp_path / "words.safetensors", "for a test")
    after = WordTable.load(str(tmp_path / "words.safetensors"))
    assert after.words == before.words
    torch.testing.assert_close(after.mean, before.mean)
    step = before.vectors.abs().amax(1, keepdim=True) / 127
    assert ((after.vectors - before.vectors).abs() <= 0.501 * step).all()


def test_files_that_are_no_table_are_named(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"other\.safetensors"):
        WordTable.load(str(path))
    with pytest.raises(UnsupportedError, match="no bundled table"):
        WordTable.load(str(tmp_path / "missing"))


def test_the_bundled_models_share_the_words_and_other_weights_have_none(continuous: Tokenizer) -> None:
    texts = ["a bird", "a castle"]
    expected = WordTable.load().embed(texts).numpy()
    for name in ("tiny-continuous", "tiny-discrete"):
        bundled = Tokenizer.load(name, device="cpu")
        assert bundled.card()["text"]
        assert np.array_equal(bundled.embed_texts(texts), expected)
        assert bundled.embed_texts([]).shape == (0, 144)
    assert not continuous.card()["text"]
    with pytest.raises(UnsupportedError, match="no text side"):
        continuous.embed_texts(texts)
