"""The plain records that travel between packages: numpy arrays and sizes, no torch, no I/O."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Int32Array: TypeAlias = npt.NDArray[np.int32]
Int16Array: TypeAlias = npt.NDArray[np.int16]
Float32Array: TypeAlias = npt.NDArray[np.float32]

Kind: TypeAlias = Literal["image", "video", "voxels"]
Fit: TypeAlias = Literal["pad", "crop"]


@dataclass(frozen=True, kw_only=True)
class Image:
    """One picture. pixels: uint8 [H, W, 3], RGB, upright, H and W at least 1."""

    pixels: UInt8Array
    notes: tuple[str, ...] = ()
    """What was done to the file that its owner may not expect ("first of 12 frames", "alpha over white")."""

    kind: Literal["image"] = field(default="image", init=False)


@dataclass(frozen=True, kw_only=True)
class Video:
    """One clip. frames: uint8 [T, H, W, 3], RGB, upright, T at least 1; fps: frames per second, None if unknown."""

    frames: UInt8Array
    fps: float | None = None
    notes: tuple[str, ...] = ()

    kind: Literal["video"] = field(default="video", init=False)


@dataclass(frozen=True, kw_only=True)
class Voxels:
    """One sparse 3D asset. coords: int32 [n, 3] (x, y, z); feats: float32 [n, 768] in 0..1 (16 x 16 RGB a voxel)."""

    coords: Int32Array
    feats: Float32Array
    notes: tuple[str, ...] = ()

    kind: Literal["voxels"] = field(default="voxels", init=False)


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a face is painted with.

    colour: RGBA, 0..1, multiplies the texture; alone where there is none. texture: uint8 [h, w, 4], RGBA with straight
    alpha, first row on top; None: the plain colour. cutout: alpha below it is a hole (0: the surface is opaque
    everywhere). is_shaded: the colour stands for one that nobody told, and is drawn under the light of meshes without
    materials: flat, it would hide the shape.
    """

    colour: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    texture: UInt8Array | None = None
    cutout: float = 0.0
    is_shaded: bool = False


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A triangle mesh in the axes of its file, turned so that z is up. P vertices, F faces.

    vertices: float32 [P, 3], finite. faces: int32 [F, 3], into vertices. materials: at least one if material_of_face
    is there. material_of_face: int32 [F], into materials; None: nothing says how the surface looks, it is drawn grey
    with shading. uv: float32 [P, 2], (0, 0) at the lower left of a texture, None if nothing is textured. colours:
    uint8 [P, 4], RGBA a vertex, multiplies the material; None if there are none.
    """

    vertices: Float32Array
    faces: Int32Array
    materials: tuple[Material, ...] = ()
    material_of_face: Int32Array | None = None
    uv: Float32Array | None = None
    colours: UInt8Array | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gaussians:
    """M Gaussian splats, in the form in which a PLY file keeps them. All float32; z up, the object in [-0.5, 0.5]^3.

    positions: [M, 3]. colours: [M, 3], SH of degree 0: RGB = 0.5 + 0.28209479177387814 * colour. opacities: [M], before
    the sigmoid. scales: [M, 3], natural logarithm of the standard deviations along the own axes. rotations: [M, 4],
    quaternions (w, x, y, z), of any length above 0.
    """

    positions: Float32Array
    colours: Float32Array
    opacities: Float32Array
    scales: Float32Array
    rotations: Float32Array

    def __len__(self) -> int:
        return int(self.positions.shape[0])


@dataclass(frozen=True, kw_only=True)
class PosedPictures:
    """V pictures of an object with their cameras: what its reconstruction is compared with.

    pictures: uint8 [V, S, S, 3], on black. world_to_camera: float32 [V, 4, 4]; intrinsics: float32 [V, 3, 3],
    normalised, both as in media.cameras. held_out: whether the object was not made from them.
    """

    pictures: UInt8Array
    world_to_camera: Float32Array
    intrinsics: Float32Array
    held_out: bool


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A 3D asset out of a file: its voxels, and pictures of it where they were asked for."""

    voxels: Voxels
    pictures: PosedPictures | None = None


@dataclass(frozen=True, kw_only=True)
class Text:
    """Words to look for items by: they have a place among the embeddings, but no tokens. text: not empty."""

    text: str

    kind: Literal["text"] = field(default="text", init=False)


Item: TypeAlias = Image | Video | Voxels
"""What has tokens."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What it takes to undo patchify exactly.

    kind: of the item. frames, height, width: what decode gives back (0, 0, 0 for voxels). Padding is always at
    the end (right, bottom, last frames), so decode cuts [:frames, :height, :width]. grid: tokens along t, rows,
    columns (0, 0, 0 for voxels). fps: of the clip, None if unknown or not a clip.
    """

    kind: Kind
    frames: int
    height: int
    width: int
    grid: tuple[int, int, int]
    fps: float | None = None


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One item's result, as arrays; the token file holds these.

    coords: int32 [n, 4] (t, x, y, z; x = patch row, y = patch column), raster order for pixels.
    latents: float32 or float16 [n, L]. codes: int16 [n, K], 0..4095. Exactly one of the two is there when the
    record is meant for decode; both are None when only an embedding or features were asked for.
    embedding: float32 [D], unit length. features: float32 or float16 [n, D], per token.
    model, revision: name of the model and hash of its weights; a decode refuses others.
    """

    coords: Int32Array
    layout: Layout
    latents: npt.NDArray[np.floating] | None = None
    codes: Int16Array | None = None
    embedding: Float32Array | None = None
    features: npt.NDArray[np.floating] | None = None
    model: str
    revision: str

    def __len__(self) -> int:
        return int(self.coords.shape[0])


FrameIterator: TypeAlias = Iterator[UInt8Array]
