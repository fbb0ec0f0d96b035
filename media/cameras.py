"""Where the views of an object were taken from: the plain record, its checks, and the readers of its two JSON forms.

Camera axes are those of OpenCV (x right, y down, looks along +z); the world is z up. V: views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from media.errors import MediaError
from media.types import Float32Array

# Volume of the unit vectors along a matrix' columns: 1 for a rotation, 0 for a singular matrix.
_SINGULAR = 1e-6
_AFFINE_ROW = 1e-5


@dataclass(frozen=True, kw_only=True)
class Cameras:
    """V pinhole cameras. A point p of the world is seen at (u, v) = q_xy / q_z, q = K (E p), at planar depth q_z.

    world_to_camera: float32 [V, 4, 4], E. intrinsics: float32 [V, 3, 3], K, normalised: u and v are 0..1 across the
    picture from its top left corner, not pixels.
    """

    world_to_camera: Float32Array
    intrinsics: Float32Array

    def __len__(self) -> int:
        return len(self.world_to_camera)

    def check(self) -> None:
        """Raise MediaError, naming the view, for arrays that are no cameras, are singular, or mirror the world."""
        for name, array, side in (("world_to_camera", self.world_to_camera, 4), ("intrinsics", self.intrinsics, 3)):
            if array.ndim != 3 or array.shape[1:] != (side, side) or array.dtype != np.float32:
                raise MediaError(
                    "invalid_camera", f"{name} must be float32 [V, {side}, {side}], not {array.dtype} {array.shape}"
                )
        if len(self.world_to_camera) != len(self.intrinsics):
            raise MediaError(
                "view_mismatch",
                f"{len(self.world_to_camera)} matrices in world_to_camera, {len(self.intrinsics)} in intrinsics",
            )
        for view, (extrinsic, intrinsic) in enumerate(zip(self.world_to_camera, self.intrinsics, strict=True)):
            _check_pose(f"view {view}: world_to_camera", extrinsic.astype(np.float64))
            _check_intrinsics(f"view {view}: intrinsics", intrinsic)


def read_transforms(document: object) -> tuple[tuple[str, ...], Cameras]:
    """Read the content of a NeRF-style transforms.json: {"frames": [{file_path, camera_angle_x, transform_matrix}]}.

    transform_matrix: 4 x 4, camera to world, axes of OpenGL and Blender (y up, looks along -z). camera_angle_x: the
    full horizontal angle in radians, of a frame or of the document; pictures are square. Instead of the angle there may
    be fl_x, fl_y, cx, cy, w and h in pixels. Returns the frames' file_path and their cameras, in order. Raises
    MediaError, naming the frame.
    """
    frames = document.get("frames") if isinstance(document, Mapping) else None
    if not isinstance(document, Mapping) or not isinstance(frames, list) or not frames:
        raise MediaError("invalid_camera", 'transforms.json must be an object with a list "frames" that is not empty')
    names: list[str] = []
    extrinsics = np.empty((len(frames), 4, 4), np.float64)
    intrinsics = np.zeros((len(frames), 3, 3), np.float32)
    for number, frame in enumerate(frames):
        where = f"frame {number}"
        if not isinstance(frame, Mapping) or not isinstance(frame.get("file_path"), str):
            raise MediaError("invalid_camera", f'{where}: must be an object with a text "file_path"')
        names.append(frame["file_path"])
        pose = _numbers(f"{where}: transform_matrix", frame.get("transform_matrix"), (4, 4))
        _check_pose(f"{where}: transform_matrix", pose)
        pose[:3, 1:3] *= -1
        extrinsics[number] = np.linalg.inv(pose)
        if "fl_x" in frame or "fl_x" in document:
            intrinsics[number] = _pixel_intrinsics(where, {**document, **frame})
            continue
        given = frame.get("camera_angle_x", document.get("camera_angle_x"))
        angle = float(_numbers(f"{where}: camera_angle_x", given, ()))
        if not 0 < angle < math.pi:
            raise MediaError("invalid_camera", f"{where}: camera_angle_x must be between 0 and pi, not {angle:g}")
        focal = 0.5 / math.tan(angle / 2)
        intrinsics[number] = np.array([[focal, 0.0, 0.5], [0.0, focal, 0.5], [0.0, 0.0, 1.0]])
    return tuple(names), Cameras(world_to_camera=extrinsics.astype(np.float32), intrinsics=intrinsics)


def read_views(document: object, side_of: Callable[[int, object], int]) -> tuple[tuple[str, ...], Cameras]:
    """Read the content of cameras.json: {"views": [{image, world_to_camera or camera_to_world, intrinsics}]}.

    Matrices are 4 x 4 with OpenCV axes, intrinsics 3 x 3: normalised, or with "intrinsics_unit": "pixels" of the
    document in pixels of the picture, whose side side_of tells of a view and its image. Returns the views' image and
    their cameras, in order. Raises MediaError, naming the view.
    """
    views = document.get("views") if isinstance(document, Mapping) else None
    if not isinstance(document, Mapping) or not isinstance(views, list) or not views:
        raise MediaError("invalid_camera", 'cameras.json must be an object with a list "views" that is not empty')
    unit = document.get("intrinsics_unit", "normalized")
    if unit not in ("normalized", "pixels"):
        raise MediaError("invalid_camera", 'intrinsics_unit must be "normalized" or "pixels"')
    names: list[str] = []
    extrinsics = np.empty((len(views), 4, 4), np.float64)
    intrinsics = np.empty((len(views), 3, 3), np.float32)
    for number, view in enumerate(views):
        where = f"view {number}"
        if not isinstance(view, Mapping) or not isinstance(view.get("image"), str):
            raise MediaError("invalid_camera", f'{where}: must be an object with a text "image"')
        if ("world_to_camera" in view) == ("camera_to_world" in view):
            raise MediaError("invalid_camera", f"{where}: give one of world_to_camera and camera_to_world")
        name = "world_to_camera" if "world_to_camera" in view else "camera_to_world"
        pose = _numbers(f"{where}: {name}", view[name], (4, 4))
        _check_pose(f"{where}: {name}", pose)
        extrinsics[number] = pose if name == "world_to_camera" else np.linalg.inv(pose)
        k = _numbers(f"{where}: intrinsics", view.get("intrinsics"), (3, 3))
        if unit == "pixels":
            k[:2] /= side_of(number, view["image"])
        intrinsics[number] = k
        names.append(view["image"])
    return tuple(names), Cameras(world_to_camera=extrinsics.astype(np.float32), intrinsics=intrinsics)


def _pixel_intrinsics(where: str, values: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Normalised, from what NeRF tools write; what is missing is taken from x, or to be the middle."""
    width = float(_numbers(f"{where}: w", values.get("w"), ()))
    height = float(_numbers(f"{where}: h", values.get("h", width), ()))
    if not (0 < width < 1e6 and width == height):
        raise MediaError("view_mismatch", f"{where}: w and h are {width:g} and {height:g}; pictures must be square")
    focal_x = float(_numbers(f"{where}: fl_x", values.get("fl_x"), ()))
    focal_y = float(_numbers(f"{where}: fl_y", values.get("fl_y", focal_x), ()))
    centre_x = float(_numbers(f"{where}: cx", values.get("cx", width / 2), ()))
    centre_y = float(_numbers(f"{where}: cy", values.get("cy", height / 2), ()))
    matrix = np.array([[focal_x / width, 0, centre_x / width], [0, focal_y / height, centre_y / height], [0, 0, 1.0]])
    _check_intrinsics(f"{where}: its intrinsics", matrix.astype(np.float32))
    return matrix


def _numbers(what: str, value: Any, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty(0, object)  # ragged lists
    if array.dtype.kind not in "iuf" or array.shape != shape:
        wanted = f"{shape[0]} rows of {shape[1]} numbers" if shape else "a number"
        raise MediaError("invalid_camera", f"{what} is missing or not {wanted}")
    return array.astype(np.float64)


def _check_pose(what: str, pose: npt.NDArray[np.float64]) -> None:
    if not np.isfinite(pose).all() or np.abs(pose).max() > 1e6:
        raise MediaError("invalid_camera", f"{what} has a number that is not finite, or beyond 1e6")
    if np.abs(pose[3] - [0, 0, 0, 1]).max() > _AFFINE_ROW:
        raise MediaError("invalid_camera", f"{what}: the last row must be 0 0 0 1, not {_listed(pose[3])}")
    lengths = np.linalg.norm(pose[:3, :3], axis=0)
    volume = float(np.linalg.det(pose[:3, :3] / np.maximum(lengths, 1e-30)))
    if lengths.min() < _SINGULAR or abs(volume) < _SINGULAR:
        raise MediaError("invalid_camera", f"{what} is singular: it has no inverse")
    if volume < 0:
        raise MediaError("invalid_camera", f"{what} mirrors the world (determinant below 0): one axis has a wrong sign")


def _check_intrinsics(what: str, matrix: Float32Array) -> None:
    if not np.isfinite(matrix).all() or np.abs(matrix).max() > 1e6:
        raise MediaError("invalid_camera", f"{what} has a number that is not finite, or beyond 1e6")
    if matrix[1, 0] != 0 or (matrix[2] != [0, 0, 1]).any() or min(matrix[0, 0], matrix[1, 1]) < _SINGULAR:
        raise MediaError(
            "invalid_camera",
            f"{what} must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]] with fx and fy above 0, not "
            + ", ".join(_listed(row) for row in matrix),
        )


def _listed(row: npt.NDArray[np.floating]) -> str:
    return "[" + " ".join(f"{value:g}" for value in row) + "]"
