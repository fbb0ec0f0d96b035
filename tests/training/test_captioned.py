"""Captions in the forms that public sets come with: the right texts for the right files, or an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.captioned import Captioned, caption_items


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def pairs(captioned: Captioned) -> list[tuple[str, str]]:
    return [
        (captioned.found.paths[owner].name, text) for text, owner in zip(captioned.texts, captioned.owners, strict=True)
    ]


def karpathy() -> dict[str, object]:
    def image(place: str, name: str, split: str, *texts: str) -> dict[str, object]:
        return {"filepath": place, "filename": name, "split": split, "sentences": [{"raw": text} for text in texts]}

    return {
        "dataset": "coco",
        "images": [
            image("val2014", "b.jpg", "test", "a bus", "the bus", "one bus"),
            image("train2014", "t.jpg", "restval", "a tree"),
            image("val2014", "a.jpg", "test", "a dog"),
        ],
    }


@pytest.mark.parametrize("place", ["val2014/", ""])
def test_the_split_of_karpathy(tmp_path: Path, place: str) -> None:
    """In the order of the file; pictures may lie in their folder or without it; so many texts of each."""
    folder = touch(tmp_path / "coco", f"{place}a.jpg", f"{place}b.jpg")
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps(karpathy()))
    found = caption_items(folder, "image", path, split="test", texts=2)
    assert pairs(found) == [("b.jpg", "a bus"), ("b.jpg", "the bus"), ("a.jpg", "a dog")]
    assert str(found) == "n = 2; 3 texts of dataset_coco.json"
    assert len(caption_items(folder, "image", path, split="test").texts) == 4
    with pytest.raises(FileNotFoundError, match=r"no file for 1 of 3 items of dataset_coco\.json, train2014/t\.jpg"):
        caption_items(folder, "image", path)
    with pytest.raises(ValueError, match="no item of split 'val'"):
        caption_items(folder, "image", path, split="val")


def test_annotations_of_coco(tmp_path: Path) -> None:
    folder = touch(tmp_path / "val2017", "1.jpg", "2.jpg", "3.jpg")
    notes = [{"image_id": 2, "caption": "two"}, {"image_id": 1, "caption": "one"}, {"image_id": 2, "caption": "zwei"}]
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in (1, 2, 3)]
    path = tmp_path / "captions_val2017.json"
    path.write_text(json.dumps({"images": images, "annotations": notes}))
    assert pairs(caption_items(folder, "image", path)) == [("1.jpg", "one"), ("2.jpg", "two"), ("2.jpg", "zwei")]
    path.write_text(json.dumps({"images": images, "annotations": [{"image_id": 9, "caption": "?"}]}))
    with pytest.raises(ValueError, match="not as of COCO nor of Karpathy's splits"):
        caption_items(folder, "image", path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("test.csv", 'key,vid_key,video_id,sentence\nret0,msr9,video9,"a man, talking"\nret1,msr8,video8,a cat\n'),
        (
            "test.json",
            '[{"video": "video9.mp4", "caption": "a man, talking"}, {"video": "video8.mp4", "caption": "a cat"}]',
        ),
        (
            "flat.json",
            '[{"video": "all/video9.mp4", "caption": ["a man, talking"]}, {"video": "video8", "text": "a cat"}]',
        ),
    ],
)
def test_a_row_a_text(tmp_path: Path, name: str, text: str) -> None:
    """MSRVTT 1K-A: clips by number, with their suffix or without."""
    folder = touch(tmp_path / "all", "video8.mp4", "video9.mp4", "video10.mp4")
    (tmp_path / name).write_text(text)
    assert pairs(caption_items(folder, "video", tmp_path / name)) == [
        ("video9.mp4", "a man, talking"),
        ("video8.mp4", "a cat"),
    ]


def test_paths_and_texts_of_this_project(tmp_path: Path) -> None:
    """The file may name more than the folder holds; equal texts are counted, since one of them must lose."""
    folder = touch(tmp_path / "images", "test/a.webp", "test/b.webp", "train/c.webp", "train/d.webp")
    listed = {
        "images/test/a.webp": {"caption": "fish", "from": "package text"},
        "images/test/b.webp": "fish",
        "images/train/c.webp": ["a tool", "the tool"],
        "images/train/d.webp": {"name": "", "category": "x"},
        "meshes/e.glb": {"name": "Wood toy", "category": "Bedroom"},
    }
    (folder / "captions.json").write_text(json.dumps(listed))
    found = caption_items(folder, None)
    assert pairs(found) == [("a.webp", "fish"), ("b.webp", "fish"), ("c.webp", "a tool"), ("c.webp", "the tool")]
    assert str(found) == "n = 3; 4 texts of captions.json; 2 are of another item too, which counts as wrong"
    few = caption_items(folder / "test", None, folder / "captions.json", limit=1)
    assert pairs(few) == [("a.webp", "fish")]
    assert str(few.found) == "n = 1 of 2 files, evenly spaced"


def test_texts_beside_files(tmp_path: Path) -> None:
    folder = touch(tmp_path, "a.glb", "b.glb")
    with pytest.raises(
        FileNotFoundError, match=r"no captions\.json and no NAME\.txt in it; name a file with --captions"
    ):
        caption_items(folder, None)
    (folder / "a.txt").write_text("a chair\n")
    found = caption_items(folder, None)
    assert found.found.kind == "asset"
    assert pairs(found) == [("a.glb", "a chair")]


def test_refusals(tmp_path: Path) -> None:
    folder = touch(tmp_path / "data", "x/a.png", "y/a.png")
    path = tmp_path / "c.json"
    for text, said in (
        ('{"a.png": "a"}', r"a\.png may be several files of the folder; give more of its path"),
        ("{", r"c\.json: "),
        ("3", "neither an object nor a list"),
        ('[{"image": "a.png"}]', "is no item: wanted video, image"),
        ("[3]", "is no item"),
        ('{"images": [{"file": 1}]}', "not as of COCO nor of Karpathy's splits"),
        ('{"images": []}', "no item"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            caption_items(folder, "image", path)
    path.write_text('{"z.png": "z"}')
    with pytest.raises(FileNotFoundError, match=r"none of its files is in c\.json"):
        caption_items(folder, "image", path)
