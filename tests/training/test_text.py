"""Captions to ids, and figures of embeddings against loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, processors

from tests.training.small_siglip2 import save_vocabulary
from training.prompts import SHORT
from training.retrieval import (
    Share,
    class_embeddings,
    neighbours,
    retrieval,
    zero_shot,
)
from training.text import CaptionTokens, clean


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("A Toucan.", "a toucan"),
        ("  snow_leopard,\n (side) ", "snow leopard side"),
        ("Tom &amp;amp; Jerry's", "tom jerrys"),
        ("schÃ¶n", "schön"),
        ("don't-stop!", "dontstop"),
        ("...", ""),
        ("<i>Tom</i> &amp;amp; Jerry", "itomi jerry"),  # ftfy itself unescapes where there is no <, hiding one of ours
        ("&lt;b&gt;Cat&lt;/b&gt; 1,000.5%", "bcatb 10005"),
        ("a \u201cb\u201d \u2013 c", "a b \u2013 c"),  # curled quotes become straight and go, other signs stay
    ],
)
def test_cleaning(caption: str, wanted: str) -> None:
    assert clean(caption) == wanted


def test_ids_end_and_are_padded_to_64(tmp_path: Path) -> None:
    save_vocabulary(tmp_path, ["<pad>", "<eos>", "<unk>", "a", "bird"])
    tokens = CaptionTokens(tmp_path)
    ids = tokens(["A bird.", "", "a " * 100])
    assert ids.shape == (3, 64)
    assert ids.dtype == torch.int64
    assert ids[0, :4].tolist() == [3, 4, 1, 0]
    assert ids[1, :2].tolist() == [1, 0]
    assert ids[2, -2:].tolist() == [3, 1]
    assert not ids[0, 3:].any()


def test_a_folder_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file; it comes with SigLIP 2"):
        CaptionTokens(tmp_path)
    save_vocabulary(tmp_path, ["<unk>", "a"])
    with pytest.raises(ValueError, match="has no '<eos>'"):
        CaptionTokens(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a whole tokenizer\.json"):
        CaptionTokens(tmp_path)


def test_what_the_file_says_of_padding_and_templates_has_no_say(tmp_path: Path) -> None:
    """Files of the library come with a template that adds ends, and with lengths of their own."""
    save_vocabulary(tmp_path, ["<pad>", "<eos>", "<unk>", "a", "bird", "<bos>"])
    path = tmp_path / "tokenizer.json"
    plain = CaptionTokens(tmp_path)(["A bird."])
    vocabulary = Tokenizer.from_file(str(path))
    vocabulary.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 5), ("<eos>", 1)]
    )
    vocabulary.enable_padding(length=8, direction="left")
    vocabulary.enable_truncation(1)
    vocabulary.save(str(path))
    assert torch.equal(CaptionTokens(tmp_path)(["A bird."]), plain)


def test_share_and_its_interval() -> None:
    share = Share(50, 100)
    low, high = share.interval
    assert [low, high] == pytest.approx([0.4038, 0.5962], abs=1e-3)
    assert str(share) == "50.0 % (40.4 to 59.6, n = 100)"
    assert Share(0, 5).interval[0] == pytest.approx(0, abs=1e-12)


def test_classes_from_words() -> None:
    words = {"cat": torch.tensor([1.0, 0.0, 0.0]), "dog": torch.tensor([0.0, 1.0, 0.0])}

    def embed(prompts: list[str]) -> torch.Tensor:
        assert len(prompts) == len(SHORT)
        return torch.stack([3 * words["cat" if "cat" in prompt else "dog"] for prompt in prompts])

    classes = class_embeddings(["cat", "dog"], SHORT, embed)
    torch.testing.assert_close(classes, torch.eye(2, 3))
    images = torch.tensor([[5.0, 1, 0], [0.1, 0.2, 9], [1, 0.9, 0]])
    assert zero_shot(images, classes, [0, 1, 1]) == Share(2, 3)
    assert zero_shot(images, classes, [0, 1, 1], k=2) == Share(3, 3)


def test_retrieval_with_several_texts_an_image() -> None:
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0, 0], [0.9, 1, 0], [0, 1, 0], [0, 0.2, 1]])
    to_images, to_texts = retrieval(images, texts, owners=[0, 0, 1, 2], k=1)
    assert to_images == Share(3, 4)  # the second text of image 0 is nearer to image 1
    assert to_texts == Share(3, 3)
    assert retrieval(images, texts, owners=[0, 0, 1, 2], k=2)[0] == Share(4, 4)


def test_neighbours_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    known, asked = torch.randn(40, 4, generator=generator), torch.randn(25, 4, generator=generator)
    labels, wanted = [index % 3 for index in range(40)], [index % 3 for index in range(25)]
    right = 0
    for row, label in zip(asked, wanted, strict=True):
        cosine = [float(row @ other / row.norm() / other.norm()) for other in known]
        near = [labels[i] for i in sorted(range(40), key=lambda i: -cosine[i])[:5]]
        most = max(near.count(name) for name in near)
        right += next(name for name in near if near.count(name) == most) == label
    assert neighbours(known, labels, asked, wanted, k=5) == Share(right, 25)
