"""Zip files from strangers."""

from __future__ import annotations

import io
import struct
import zipfile
from contextlib import suppress

import numpy as np
import pytest

from media.archive import open_archive
from media.errors import MediaError
from media.limits import Limits
from tests.media.meshes import zipped
from tests.paths import DATA, needs_data

LIMITS = Limits()


def unpack(data: bytes, limits: Limits = LIMITS) -> None:
    archive = open_archive(data, limits)
    for name in archive.names:
        archive.read(name)


def refused(data: bytes, limits: Limits = LIMITS) -> MediaError:
    with pytest.raises(MediaError) as caught:
        unpack(data, limits)
    return caught.value


def test_files_come_back_in_order_and_system_rubbish_does_not() -> None:
    archive = open_archive(
        zipped({"b/x.obj": b"one", "a.png": b"two", "__MACOSX/._x.obj": b"", "b/.DS_Store": b""}), LIMITS
    )
    assert archive.names == ("b/x.obj", "a.png")
    assert archive.read("b/x.obj") == b"one"
    with pytest.raises(MediaError, match="no member"):
        archive.read("c")


@pytest.mark.parametrize("name", ["../evil", "/etc/x", "a/../../b", "C:/x", "a\\b", "a/./b", "x\ny", "bell\x07"])
def test_names_that_lead_elsewhere(name: str) -> None:
    assert "only plain relative paths" in refused(zipped({name: b"x"})).detail


def test_links_encryption_and_unknown_methods() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/hostname")
    assert "link" in refused(buffer.getvalue()).detail
    plain = bytearray(zipped({"a": b"content"}))
    central = plain.index(b"PK\x01\x02")
    locked = bytearray(plain)
    locked[central + 8] |= 1
    assert "encrypted" in refused(bytes(locked)).detail
    struct.pack_into("<H", plain, central + 10, 99)
    assert "method 99" in refused(bytes(plain)).detail


def test_bounds_hold_for_what_is_said_and_for_what_comes_out() -> None:
    bomb = zipped({"zeros": bytes(3_000_000)})
    assert len(bomb) < 10_000
    small = Limits(archive_unpacked_bytes=1_000_000)
    assert refused(bomb, small).code == "item_too_large"
    # A header that says less than there is.
    liar = bytearray(bomb)
    for mark, place in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        struct.pack_into("<I", liar, liar.index(mark) + place, 10)
    assert refused(bytes(liar), small).code in ("item_too_large", "corrupt_media")
    assert refused(zipped({str(n): b"" for n in range(20)}), Limits(archive_members=19)).limit == 19
    assert refused(bomb, Limits(archive_bytes=100)).limit == 100
    with pytest.raises(MediaError, match="more than 1000 bytes"):
        open_archive(bomb, LIMITS).read("zeros", 1000)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_stands_once() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", b"1")
        archive.writestr("a", b"2")
    assert "two members" in refused(buffer.getvalue()).detail


def test_spoilt_archives_give_media_errors_only() -> None:
    whole = zipped({"a.obj": b"v 0 0 0\n" * 50, "b/c.png": bytes(range(256))})
    chance = np.random.default_rng(3)
    for _ in range(400):
        data = bytearray(whole)
        for place in chance.integers(0, len(data), 3):
            data[place] = int(chance.integers(256))
        with suppress(MediaError):
            unpack(bytes(data))


@needs_data
@pytest.mark.parametrize("name", ["zip_traversal", "zip_symlink", "zip_many", "not_zip"])
def test_shared_bad_archives(name: str) -> None:
    assert refused((DATA / "bad" / f"{name}.zip").read_bytes()).status in (413, 422)
