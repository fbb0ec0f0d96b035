"""Small meshes in all formats, written without the code that reads them: three arms of other lengths and colours."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import trimesh
from PIL import Image
from trimesh.visual import ColorVisuals
from trimesh.visual.material import PBRMaterial
from trimesh.visual.texture import TextureVisuals

from tests.media.posed import ARMS

TO_Y_UP = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
"""(x, y, z) of z up to (x, z, -y) of y up."""


def zipped(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def box(low: tuple[float, ...], high: tuple[float, ...]) -> trimesh.Trimesh:
    extents = np.subtract(high, low)
    moved = trimesh.creation.box(extents=extents)
    moved.apply_translation(np.add(low, high) / 2)
    return moved


def arms() -> trimesh.Trimesh:
    """All three in one mesh with vertex colours, z up, the whole in [-0.35, 0.45] x [-0.35, 0.35] x [-0.35, 0.2]."""
    parts = []
    for arm in ARMS:
        part = box(arm.low, arm.high)
        part.visual = ColorVisuals(part, vertex_colors=np.tile([*arm.colour, 255], (len(part.vertices), 1)))
        parts.append(part)
    joined: trimesh.Trimesh = trimesh.util.concatenate(parts)
    return joined


def arms_ply() -> bytes:
    data: bytes = arms().export(file_type="ply")
    return data


def arms_glb() -> bytes:
    """Y up, as glTF wants it: each arm a node of its own with a transform, painted by factor, texture and vertices."""
    scene = trimesh.Scene()
    for number, arm in enumerate(ARMS):
        part = box(arm.low, arm.high)
        if number == 0:
            part.visual = TextureVisuals(material=PBRMaterial(baseColorFactor=[*arm.colour, 255]))
        elif number == 1:
            uv = np.full((len(part.vertices), 2), 0.5)
            picture = Image.fromarray(np.full((8, 8, 3), arm.colour, np.uint8))
            part.visual = TextureVisuals(uv=uv, material=PBRMaterial(baseColorTexture=picture))
        else:
            part.visual = ColorVisuals(part, vertex_colors=np.tile([*arm.colour, 255], (len(part.vertices), 1)))
        shift = np.eye(4)
        shift[:3, 3] = (0.1 * number, -0.2, 0.3)
        part.apply_transform(np.linalg.inv(shift) @ TO_Y_UP)
        scene.add_geometry(part, transform=shift)
    data: bytes = scene.export(file_type="glb")
    return data


def arms_obj_zip(**changed: bytes | None) -> bytes:
    """Y up, MTL colours for two arms, a texture for the third; changed: other content of a member, None: left out."""
    lines, count = ["mtllib arms.mtl"], 0
    for number, arm in enumerate(ARMS):
        part = box(arm.low, arm.high)
        part.apply_transform(TO_Y_UP)
        lines += [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in part.vertices]
        lines += [f"vt {0.25:.2f} {0.75:.2f}"] if number == 2 else []
        lines.append(f"usemtl arm {number}")
        for face in part.faces + count + 1:
            lines.append("f " + " ".join(f"{corner}/1" if number == 2 else str(corner) for corner in face))
        count += len(part.vertices)
    paints = [
        f"newmtl arm {number}\nKd {' '.join(str(value / 255) for value in arm.colour)}"
        for number, arm in enumerate(ARMS)
    ]
    paints[2] = "newmtl arm 2\nKd 0 0 0\nmap_Kd textures\\blue.png"
    texture = np.zeros((8, 8, 3), np.uint8)
    texture[:4, :4] = ARMS[2].colour  # v = 0.75 is in the upper half
    members = {
        "thing/arms.obj": "\n".join(lines).encode(),
        "thing/arms.mtl": "\n".join(paints).encode(),
        "thing/textures/blue.png": png(texture),
    }
    for name, data in changed.items():
        full = next(path for path in members if path.rsplit("/")[-1].replace(".", "_") == name)
        if data is None:
            del members[full]
        else:
            members[full] = data
    return zipped(members)
