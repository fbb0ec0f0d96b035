"""Pictures of free packages, for training and scores: `python -m training.collect_pictures OUT`.

`pictures.csv` lists every file with its package, version and sha256. They land in OUT/train, OUT/clipart and
OUT/labelled/CLASS, as `--more` and `--labelled` want them. npm, apt-get and pip fetch the packages, by exact version.
"""

from __future__ import annotations

import argparse
import csv
import glob
import hashlib
import lzma
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from media.limits import MIB
from training.data import LANCZOS, read_picture

LONGEST_SIDE = {"train": 1024, "clipart": 320, "labelled": 1024}
"""Pixels of the longer side at most, by use."""

JPEG_QUALITY = 92
MOST_BYTES = 64 * MIB
"""Of a listed file."""

PATIENCE_S = 900.0
"""What one package may take to be fetched or unpacked."""

BROKEN = (
    *(OSError, subprocess.SubprocessError, EOFError, RuntimeError),
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
"""What a package may end with that is not there or not whole; the others are tried all the same."""

FORMS = {
    "registry": re.compile(r"npm|debian|pypi"),
    "package": re.compile(r"@?[A-Za-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9][A-Za-z0-9._+-]*)?"),
    "version": re.compile(r"[A-Za-z0-9][A-Za-z0-9.:~+_-]*"),
    "path": re.compile(r".+"),
    "sha256": re.compile(r"[0-9a-f]{64}"),
    "use": re.compile("|".join(LONGEST_SIDE)),
    "label": re.compile(r"[a-z0-9_]*"),
}


@dataclass(frozen=True)
class Package:
    """registry: npm, debian or pypi. source: of pypi, whether it is the source archive and not the wheel."""

    registry: str
    name: str
    version: str
    source: bool = False

    def __str__(self) -> str:
        return f"{self.registry} {self.name} {self.version}"


@dataclass(frozen=True)
class Picture:
    """A row of the list. path: inside the package; sha256: of the file there; label: of labelled ones, else empty."""

    package: Package
    path: str
    sha256: str
    use: str
    label: str

    def place(self, suffix: str) -> Path:
        """Where it goes under OUT. Nothing of `path` but letters, digits, dots and dashes of its name gets in."""
        package = self.package.name.removeprefix("@").replace("/", "-")
        stem = re.sub(r"[^A-Za-z0-9.-]+", "_", Path(self.path).stem)
        return Path(self.use, self.label, f"{package}__{stem}-{self.sha256[:8]}{suffix}")


def read_list(path: Path) -> list[Picture]:
    """Raises ValueError, with the line, for a row that is not as it must be."""
    pictures = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for row in reader:
            for column, form in FORMS.items():
                if not form.fullmatch(row.get(column) or ""):
                    raise ValueError(f"{path.name}, line {reader.line_num}: no {column}: {row.get(column)!r}")
            if (row["use"] == "labelled") != bool(row["label"]):
                raise ValueError(f"{path.name}, line {reader.line_num}: a label is for labelled pictures, all of them")
            name, version = row["package"], row["version"]
            # Paths in a source archive begin with its folder.
            source = row["registry"] == "pypi" and row["path"].startswith(f"{name}-{version}/")
            package = Package(row["registry"], name, version, source)
            pictures.append(Picture(package, row["path"], row["sha256"], row["use"], row["label"]))
    return pictures


def collect(pictures: Sequence[Picture], out: Path, packages: Path | None, log: Callable[[str], None]) -> list[str]:
    """Write the pictures under `out`; returns what could not be had, a line each.

    packages: folder with archives as the clients name them; None: they are fetched, one at a time.
    """
    wanted: dict[Package, list[Picture]] = {}
    for picture in pictures:
        wanted.setdefault(picture.package, []).append(picture)
    troubles = []
    for package, listed in wanted.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            try:
                if packages is None:
                    fetch(package, folder)
                archive = find_archive(package, folder if packages is None else packages)
                files = dict(_members(archive, {picture.path for picture in listed}, folder))
            except BROKEN as error:
                troubles.append(f"{package}: {error}; {len(listed)} pictures")
                log(troubles[-1])
                continue
            found = [_write(picture, files, out, folder / "picture") for picture in listed]
        bad = [f"{package}: {trouble}" for trouble in found if trouble]
        log(f"{package}: {len(listed) - len(bad)} of {len(listed)}")
        troubles += bad
    return troubles


def fetch(package: Package, folder: Path) -> None:
    """Download the archive into `folder`. Raises OSError if the client is missing or says no, TimeoutExpired."""
    name, version = package.name, package.version
    kind = f"--no-binary={name}" if package.source else f"--only-binary={name}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, "--dest", ".", f"{name}=={version}"]
    command = {
        "npm": ["npm", "pack", "--ignore-scripts", f"{name}@{version}"],
        "debian": ["apt-get", "download", f"{name}={version}"],
        "pypi": pip,
    }[package.registry]
    _run(command, folder)


def find_archive(package: Package, folder: Path) -> Path:
    """The downloaded file of a package. Raises FileNotFoundError."""
    name, version = package.name, package.version
    if package.registry == "npm":
        pattern = glob.escape(f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz")
    elif package.registry == "debian":
        pattern = glob.escape(f"{name}_{version.replace(':', '%3a')}_") + "*.deb"
    else:
        pattern = re.sub(r"[-_.]+", "[-_.]", name) + f"-{version}" + (".tar.gz" if package.source else "-*.whl")
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"no archive {pattern}")
    return found[0]


def _members(archive: Path, wanted: set[str], folder: Path) -> Iterator[tuple[str, bytes]]:
    """Contents of the wanted files by their paths, which are never written to; no links, none over MOST_BYTES."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                if entry.filename in wanted and entry.file_size <= MOST_BYTES:
                    yield entry.filename, wheel.read(entry)
        return
    if archive.suffix == ".deb":
        unpacked = folder / "data.tar"
        with unpacked.open("wb") as file:
            _run(["dpkg-deb", "--fsys-tarfile", str(archive.resolve())], folder, file.fileno())
        archive = unpacked
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if name in wanted and member.isreg() and member.size <= MOST_BYTES:
                file_in_tar = tar.extractfile(member)
                assert file_in_tar is not None
                yield name, file_in_tar.read()


def _run(command: Sequence[str], folder: Path, stdout: int = subprocess.PIPE) -> None:
    """Raises OSError with the last line that the command said."""
    try:
        done = subprocess.run(command, cwd=folder, stdout=stdout, stderr=subprocess.PIPE, timeout=PATIENCE_S)
    except FileNotFoundError as error:
        raise OSError(f"{command[0]} is not installed") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no word why"]
        raise OSError(f"{Path(command[0]).name} failed: {said[-1]}")


def _write(picture: Picture, files: Mapping[str, bytes], out: Path, scratch: Path) -> str | None:
    """Save one picture, JPEG unless it has transparency or is clip art; returns what is wrong with it."""
    data = files.get(picture.path)
    if data is None:
        return f"{picture.path} is not in the package"
    if hashlib.sha256(data).hexdigest() != picture.sha256:
        return f"{picture.path} has another sha256"
    scratch.write_bytes(data)
    try:
        image = read_picture(scratch)
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        return f"{picture.path}: {error}"
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255):
        image = image.convert("RGB")
    side = LONGEST_SIDE[picture.use]
    image.thumbnail((side, side), LANCZOS)
    suffix = ".png" if image.mode == "RGBA" or picture.use == "clipart" else ".jpg"
    target = out / picture.place(suffix)
    target.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".png":
        image.save(target, optimize=True)
    else:
        image.save(target, quality=JPEG_QUALITY)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Collect and count. Returns the exit status: 1 if a listed picture could not be had, 2 for a broken list."""
    parser = argparse.ArgumentParser(prog="python -m training.collect_pictures", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for train, clipart and labelled")
    parser.add_argument("--only", choices=LONGEST_SIDE, help="the pictures of this use")
    parser.add_argument("--packages", type=Path, metavar="FOLDER", help="downloaded archives; nothing is fetched")
    parser.add_argument("--list", type=Path, metavar="FILE", default=Path(__file__).with_name("pictures.csv"))
    given = parser.parse_args(arguments)
    try:
        pictures = [picture for picture in read_list(given.list) if given.only in (None, picture.use)]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    troubles = collect(pictures, given.out, given.packages, print)
    for use, listed in Counter(picture.use for picture in pictures).items():
        folder = given.out / use
        print(f"{use}: {sum(path.is_file() for path in folder.rglob('*'))} pictures in {folder}, {listed} listed")
    for trouble in troubles:
        print(f"not had: {trouble}", file=sys.stderr)
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
