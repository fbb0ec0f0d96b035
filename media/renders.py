"""Posed renders of one object, as files: pictures, depth maps and a file of cameras, to Views.

transforms.json: NeRF style, {"frames": [{file_path, transform_matrix, camera_angle_x}]}, OpenGL axes; the depth of
000.png is 000_depth.npy, .exr or .png, or what the frame's depth_file_path says.
cameras.json: {"views": [{"image", "depth", "world_to_camera" or "camera_to_world" (4 x 4, OpenCV axes), "intrinsics"
(3 x 3)}], "intrinsics_unit": "normalized" (default) or "pixels"}.
Depth is planar, in units of the world: .npy of floats, .exr, or 16-bit .png with a "depth_scale" (units a step, 0 is
no surface) in the cameras' file or the view.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from media.archive import Archive
from media.cameras import read_transforms, read_views
from media.errors import MediaError
from media.exr import read_exr
from media.image import decode_rgba
from media.limits import Limits
from media.mesh_parts import shown
from media.multiview import FAR, Views
from media.npy_file import load_npy
from media.sniff import probe
from media.types import UInt8Array

CAMERA_FILES = ("transforms.json", "cameras.json")
PICTURES, DEPTH_ALONE = (".png", ".webp", ".jpg", ".jpeg"), (".npy", ".exr")
"""Suffixes of pictures, and those that only depth maps have."""
JSON_BYTES = 4 * 1024 * 1024

Depth = npt.NDArray[np.floating]


def is_renders(names: tuple[str, ...]) -> bool:
    """Whether files of these names are posed renders."""
    return any(PurePosixPath(name).name in CAMERA_FILES for name in names)


def load_renders(archive: Archive, limits: Limits) -> tuple[Views, tuple[str, ...]]:
    """Read and check all views; also what their sender may want to know. Raises MediaError, naming the view."""
    found = [name for name in archive.names if PurePosixPath(name).name in CAMERA_FILES]
    if len(found) != 1:
        raise MediaError("view_mismatch", f"there are {len(found)} files of cameras ({', '.join(found[:3])}); send one")
    document = _json(archive.read(found[0]), found[0])
    is_nerf = PurePosixPath(found[0]).name == "transforms.json"
    entries = document.get("frames" if is_nerf else "views")
    count = len(entries) if isinstance(entries, list) else 0
    if count > limits.views:
        raise MediaError(
            "too_many_items",
            f"there are {count} views; at most {limits.views} are allowed",
            limit=limits.views,
            actual=count,
        )
    folder = PurePosixPath(found[0]).parent
    used: set[str] = {found[0]}
    if is_nerf:
        names, cameras = read_transforms(document)
    else:
        names, cameras = read_views(document, lambda view, name: _side(archive, folder, view, name, limits))
    pictures: list[str] = []
    maps: list[str] = []
    images, depths = [], []
    for view, name in enumerate(names):
        entry = document["frames" if is_nerf else "views"][view]
        picture = _find(archive, folder, name, view, "picture", PICTURES)
        given = entry.get("depth_file_path" if is_nerf else "depth")
        stem = str(PurePosixPath(name).with_suffix(""))
        depth = _find(archive, folder, given or f"{stem}_depth", view, "depth map", (*DEPTH_ALONE, ".png"))
        for path in (picture, depth):
            if path in used:
                raise MediaError("view_mismatch", f"view {view}: the file {path!r} is used twice")
            used.add(path)
        pictures.append(picture)
        maps.append(depth)
        images.append(_picture(archive.read(picture), view, limits))
        scale = entry.get("depth_scale", document.get("depth_scale"))
        depths.append(_depth(archive.read(depth), depth, view, scale, limits))
    spare = [name for name in archive.names if name not in used]
    _check_spare(spare, pictures, maps, found[0])
    notes = (f"{len(spare)} files belong to no view and were not read ({spare[0]!r})",) if spare else ()
    return Views(images=images, depths=depths, cameras=cameras), notes


def _find(
    archive: Archive, folder: PurePosixPath, name: object, view: int, what: str, suffixes: tuple[str, ...]
) -> str:
    """Path in the archive of what a cameras' file names, with or without its suffix."""
    if not isinstance(name, str) or not name or len(name) > 500:
        raise MediaError("view_mismatch", f"view {view}: the name of its {what} is missing or no text")
    path = folder / name.removeprefix("./")
    if ".." in path.parts or path.is_absolute():
        raise MediaError("view_mismatch", f"view {view}: its {what} must lie beside the file of cameras")
    tried = [str(path), *(f"{path}{suffix}" for suffix in suffixes)]
    for candidate in tried:
        if candidate in archive.names:
            return candidate
    raise MediaError(
        "view_mismatch", f"view {view}: its {what} is missing; looked for {', '.join(map(repr, tried[:4]))}"
    )


def _check_spare(spare: Sequence[str], pictures: Sequence[str], maps: Sequence[str], cameras: str) -> None:
    """Raise MediaError for pictures and depth maps that no view names, and name the first of them.

    spare: files of no view; pictures, maps: one of each a view. What lies in other folders is something else (smaller
    copies, masks), and so is another file of a view that there is: published exports have 000_depth.exr beside
    000_depth.npy, renderers write 000_normal.png.
    """
    folders = {PurePosixPath(name).parent for name in (*pictures, *maps)}
    stems = {str(PurePosixPath(name).with_suffix("")) for name in (*pictures, *maps)}
    left: list[str] = []
    left_maps = 0
    for name in spare:
        path = PurePosixPath(name)
        suffix, stem = path.suffix.lower(), str(path.with_suffix(""))
        if suffix not in (*PICTURES, *DEPTH_ALONE) or path.parent not in folders:
            continue
        if not any(stem == other or stem.startswith(f"{other}_") for other in stems):
            left.append(name)
            left_maps += suffix in DEPTH_ALONE or stem.endswith("_depth")
    if left:
        raise MediaError(
            "view_mismatch",
            f"there are {len(pictures) + len(left) - left_maps} pictures, {len(maps) + left_maps} depth maps and "
            f"{len(pictures)} views in {cameras}; no view names {', '.join(map(shown, left[:4]))}",
        )


def _side(archive: Archive, folder: PurePosixPath, view: int, name: object, limits: Limits) -> int:
    """Side of a view's picture in pixels, from its header."""
    path = _find(archive, folder, name, view, "picture", PICTURES)
    return probe(archive.read(path), limits, declared="image").width


def _json(data: bytes, name: str) -> dict[str, Any]:
    if len(data) > JSON_BYTES:
        raise MediaError("invalid_camera", f"{name} has {len(data)} bytes; at most {JSON_BYTES} are allowed")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise MediaError("invalid_camera", f"{name} is not valid JSON") from None
    if not isinstance(document, dict):
        raise MediaError("invalid_camera", f"{name} must be a JSON object")
    return document


def _picture(data: bytes, view: int, limits: Limits) -> UInt8Array:
    try:
        pixels = decode_rgba(data, limits)
    except MediaError as error:
        raise MediaError(error.code, f"view {view}: {error.detail}", limit=error.limit, actual=error.actual) from None
    _check_side(pixels.shape[0], view, limits)
    return pixels


def _depth(data: bytes, name: str, view: int, scale: object, limits: Limits) -> Depth:
    what = f"view {view}: the depth map"
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".npy":
        array = load_npy(data, what)
        if array.dtype.kind != "f":
            raise MediaError("view_mismatch", f"{what} is {array.dtype}; wanted floats in units of the world")
        if array.ndim == 3 and array.shape[-1] == 1:
            array = array[..., 0]
        depth: Depth = array if array.dtype.itemsize <= 4 else array.astype(np.float32)
    elif suffix == ".exr":
        depth = _as_published(read_exr(data, what, limits))
    else:
        depth = _png_depth(data, what, scale, limits)
    if depth.ndim != 2 or 0 in depth.shape:
        raise MediaError("view_mismatch", f"{what} has the shape {list(depth.shape)}; wanted [S, S]")
    _check_side(max(depth.shape), view, limits)
    return depth


def _as_published(depth: npt.NDArray[np.float32]) -> Depth:
    """What the published converter makes of an EXR: nothing where it is far, and half precision."""
    return np.where(depth > FAR, np.float32(-1), depth).clip(-65504, 65504).astype(np.float16)


def _png_depth(data: bytes, what: str, scale: object, limits: Limits) -> Depth:
    header = probe(data, limits, declared="image")
    if header.format != "png" or data[24] != 16:
        raise MediaError("view_mismatch", f"{what} must be a 16-bit PNG, .npy or .exr: 8 bits are too coarse")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < FAR:
        raise MediaError(
            "view_mismatch", f'{what} is a PNG: add "depth_scale", the units of the world that one step means (above 0)'
        )
    try:
        with PILImage.open(io.BytesIO(data), formats=("PNG",)) as picture:
            steps = np.asarray(picture)
    except (OSError, ValueError, SyntaxError):
        raise MediaError("corrupt_media", f"{what} is damaged") from None
    if steps.ndim != 2:
        raise MediaError("view_mismatch", f"{what} must have one channel")
    return np.where(steps > 0, steps * np.float32(scale), np.float32(-1)).astype(np.float32)


def _check_side(side: int, view: int, limits: Limits) -> None:
    if side > limits.view_side:
        raise MediaError(
            "image_too_large",
            f"view {view} is {side} pixels wide; at most {limits.view_side} are allowed",
            limit=limits.view_side,
            actual=side,
        )
