"""Class folders and what they are called, in the forms that public sets come with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.eval_items import Found
from training.labelled import label_items


def items(folder: Path, *names: str) -> Found:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    paths = tuple(sorted(folder / name for name in names))
    return Found("image", paths, len(paths))


def test_folders_are_called_by_their_names(tmp_path: Path) -> None:
    found = items(tmp_path, "tree_or_mushroom/a.png", "bird/b.png", "bird/more/c.png")
    (tmp_path / "windmill").mkdir()
    labelled = label_items(found, tmp_path, None)
    assert labelled.names == ("bird", "tree or mushroom", "windmill")
    assert labelled.labels == (0, 0, 1)
    assert str(labelled) == "n = 3; 3 classes, named by their folders"


WORDNET = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish", "n02012849": "goldfish"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(WORDNET)),
        ("b.json", json.dumps({str(row): list(pair) for row, pair in enumerate(WORDNET.items())})),
        ("c.txt", "".join(f"{folder} {name}\n" for folder, name in WORDNET.items())),
        ("d.tsv", "".join(f"{folder}\t{name}\n" for folder, name in WORDNET.items())),
    ],
)
def test_a_file_of_folders_and_names(tmp_path: Path, name: str, text: str) -> None:
    """All its classes are to choose from, also those without a picture."""
    found = items(tmp_path / "val", "n01443537/b.JPEG", "n01440764/a.JPEG")
    (tmp_path / name).write_text(text)
    labelled = label_items(found, tmp_path / "val", tmp_path / name)
    assert labelled.names == ("tench", "goldfish", "goldfish")
    assert labelled.labels == (0, 1)
    assert str(labelled) == f"n = 2; 3 classes, 1 of them with the name of another, named by {name}"


@pytest.mark.parametrize("text", ["ant\nbee\ncat\n" + "x\n" * 8, json.dumps(["ant", "bee", "cat", *"xxxxxxxx"])])
def test_a_list_of_names_for_numbered_folders(tmp_path: Path, text: str) -> None:
    """ImageNet-v2: 10 comes after 2, and not every number need be there."""
    found = items(tmp_path / "v2", "10/a.jpeg", "2/b.jpeg", "0/c.jpeg")
    (tmp_path / "names").write_text(text)
    labelled = label_items(found, tmp_path / "v2", tmp_path / "names")
    assert [labelled.names[row] for row in labelled.labels] == ["ant", "x", "cat"]
    pairs = {str(row): [f"n0000000{row % 10}", name] for row, name in enumerate(labelled.names)}
    (tmp_path / "index.json").write_text(json.dumps(pairs))
    assert label_items(found, tmp_path / "v2", tmp_path / "index.json").labels == labelled.labels


def test_a_list_of_names_for_folders_in_order(tmp_path: Path) -> None:
    found = items(tmp_path / "val", "n2/a.png", "n1/b.png")
    (tmp_path / "names.txt").write_text("first\nsecond\n")
    assert label_items(found, tmp_path / "val", tmp_path / "names.txt").names == ("first", "second")
    (tmp_path / "names.txt").write_text("first\nsecond\nthird\n")
    with pytest.raises(ValueError, match="3 names in a list for 2 class folders; wanted as many"):
        label_items(found, tmp_path / "val", tmp_path / "names.txt")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.png is in no class folder; wanted CLASS/a\.png"):
        label_items(items(tmp_path / "flat", "a.png"), tmp_path / "flat", None)
    wordnet = items(tmp_path / "val", "n01440764/a.png", "n01443537/a.png")
    with pytest.raises(ValueError, match="folders like n01440764 name no class: give --classnames FILE"):
        label_items(wordnet, tmp_path / "val", None)
    names = tmp_path / "names.json"
    for text, said in (
        ('{"n01440764": "tench"}', "no name for 1 of the class folders, n01443537 first"),
        ("{", "no JSON"),
        ('{"n01440764": 3}', "class 'n01440764' has no name"),
        ('{"n01440764": " , "}', "class 'n01440764' has no name"),
        ("3", "no class in it"),
    ):
        names.write_text(text)
        with pytest.raises(ValueError, match=said):
            label_items(wordnet, tmp_path / "val", names)
