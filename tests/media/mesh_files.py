"""Mesh files that tests write themselves, by the rules of each format: one small object, asymmetric and coloured."""

from __future__ import annotations

import base64
import io
import json
import struct
import zipfile
from typing import Any

import numpy as np
from PIL import Image as PILImage

# z up: what points along +x is red, along +y green, along +z blue. Each arm is one triangle of its own size.
POINTS = np.array(
    [[0, 0, 0], [3, 0, 0], [3, 0.5, 0], [0, 0, 0], [0, 2, 0], [0, 2, 0.5], [0, 0, 0], [0, 0, 1], [0.5, 0, 1]],
    np.float32,
)
FACES = np.arange(9).reshape(3, 3)
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
# The texture has the red on its upper row's left, the green on its right, the blue below.
TEXTURE = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 255]]], np.uint8).repeat(8, 0).repeat(8, 1)
UV = np.repeat([[0.25, 0.75], [0.75, 0.75], [0.5, 0.25]], 3, axis=0)  # (0, 0) at the lower left
Y_UP = np.stack([POINTS[:, 0], POINTS[:, 2], -POINTS[:, 1]], axis=1)


def png(pixels: np.ndarray[Any, Any] = TEXTURE) -> bytes:
    out = io.BytesIO()
    PILImage.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def zipped(**files: bytes) -> bytes:
    """Keys with `__` for the dot of a name."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name.replace("__", "."), data)
    return out.getvalue()


class Gltf:
    """A document under way: add() appends an accessor and gives its number."""

    def __init__(self) -> None:
        self.document: dict[str, Any] = {
            "asset": {"version": "2.0"},
            "buffers": [{}],
            "bufferViews": [],
            "accessors": [],
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [{"mesh": 0}],
        }
        self.binary = b""

    def view(self, data: bytes) -> int:
        self.binary += b"\0" * (-len(self.binary) % 4)
        self.document["bufferViews"].append({"buffer": 0, "byteOffset": len(self.binary), "byteLength": len(data)})
        self.binary += data
        return len(self.document["bufferViews"]) - 1

    def add(self, array: np.ndarray[Any, Any], **more: Any) -> int:
        kinds = {"int8": 5120, "uint8": 5121, "int16": 5122, "uint16": 5123, "uint32": 5125, "float32": 5126}
        width = 1 if array.ndim == 1 else array.shape[1]
        self.document["accessors"].append(
            {
                "bufferView": self.view(array.tobytes()),
                "componentType": kinds[array.dtype.name],
                "count": len(array),
                "type": {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4"}[width],
                **more,
            }
        )
        return len(self.document["accessors"]) - 1

    def glb(self) -> bytes:
        binary = self.binary + b"\0" * (-len(self.binary) % 4)
        self.document["buffers"] = [{"byteLength": len(self.binary)}]
        text = json.dumps(self.document).encode()
        text += b" " * (-len(text) % 4)
        chunks = struct.pack("<II", len(text), 0x4E4F534A) + text + struct.pack("<II", len(binary), 0x004E4942) + binary
        return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks

    def gltf(self, uri: str | None = None) -> bytes:
        if uri is None:
            uri = "data:application/octet-stream;base64," + base64.b64encode(self.binary).decode()
        self.document["buffers"] = [{"byteLength": len(self.binary), "uri": uri}]
        return json.dumps(self.document).encode()


def plain_gltf(points: np.ndarray[Any, Any] = Y_UP) -> Gltf:
    """The object without any paint."""
    file = Gltf()
    attributes = {"POSITION": file.add(points.astype(np.float32))}
    indices = file.add(FACES.reshape(-1).astype(np.uint16))
    file.document["meshes"] = [{"primitives": [{"attributes": attributes, "indices": indices}]}]
    return file


def primitive(file: Gltf) -> dict[str, Any]:
    found: dict[str, Any] = file.document["meshes"][0]["primitives"][0]
    return found


def textured_gltf(image: bytes | None = None, uv: np.ndarray[Any, Any] = UV, **material: Any) -> Gltf:
    """The object painted by a texture; `material` adds to its material."""
    file = plain_gltf()
    from_top = np.stack([uv[:, 0], 1 - uv[:, 1]], axis=1).astype(np.float32)
    primitive(file)["attributes"]["TEXCOORD_0"] = file.add(from_top)
    primitive(file)["material"] = 0
    file.document["images"] = [{"bufferView": file.view(image or png()), "mimeType": "image/png"}]
    file.document["textures"] = [{"source": 0}]
    file.document["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}, **material}]
    return file


def coloured_gltf() -> Gltf:
    """The object with colours at its vertices."""
    file = plain_gltf()
    colours = np.concatenate([COLOURS.repeat(3, 0), np.full((9, 1), 255, np.uint8)], axis=1)
    primitive(file)["attributes"]["COLOR_0"] = file.add(colours, normalized=True)
    return file


def factors_gltf() -> Gltf:
    """The object with a material for each arm, by base colour."""
    file = plain_gltf()
    whole = primitive(file)
    file.document["meshes"][0]["primitives"] = [
        {"attributes": whole["attributes"], "indices": file.add(face.astype(np.uint32)), "material": number}
        for number, face in enumerate(FACES)
    ]
    file.document["materials"] = [
        {"pbrMetallicRoughness": {"baseColorFactor": [*(colour / 255).tolist(), 1.0]}} for colour in COLOURS
    ]
    return file


def obj(*, material: bool = True) -> bytes:
    lines = ["# an object", "mtllib object.mtl"]
    lines += [f"v {x} {y} {z}" for x, y, z in Y_UP.tolist()]
    lines += [f"vt {u} {v}" for u, v in UV.tolist()]
    lines += ["usemtl some paint"] if material else []
    lines += ["f " + " ".join(f"{corner + 1}/{corner + 1}" for corner in face) for face in FACES]
    return "\n".join(lines).encode()


def obj_zip(mtl: bytes = b"newmtl some paint\nKd 0 0 0\nmap_Kd textures\\wood.png\n", **files: bytes) -> bytes:
    return zipped(**{"a/object__obj": obj(), "a/object__mtl": mtl, **(files or {"a/textures/wood__png": png()})})


def factors_obj_zip() -> bytes:
    lines = ["mtllib object.mtl"] + [f"v {x} {y} {z}" for x, y, z in Y_UP.tolist()]
    for number, face in enumerate(FACES):
        lines += [f"usemtl {number}", "f " + " ".join(str(corner - 9) for corner in face)]
    mtl = [f"newmtl {n}\nKd {r / 255} {g / 255} {b / 255}" for n, (r, g, b) in enumerate(COLOURS.tolist())]
    return zipped(object__obj="\n".join(lines).encode(), object__mtl="\n".join(mtl).encode())


def coloured_obj() -> bytes:
    rows = np.concatenate([Y_UP, COLOURS.repeat(3, 0) / 255], axis=1)
    lines = ["v " + " ".join(map(str, row)) for row in rows.tolist()]
    return "\n".join([*lines, *("f " + " ".join(str(corner + 1) for corner in face) for face in FACES)]).encode()


def ply(format: str = "binary_little_endian", *, of_faces: bool = False) -> bytes:
    """Colours at the vertices or at the faces."""
    order = ">" if format == "binary_big_endian" else "<"
    colours = "".join(f"property uchar {name}\n" for name in ("red", "green", "blue"))
    head = f"ply\nformat {format} 1.0\ncomment made by a test\nelement vertex 9\n"
    head += "".join(f"property float {axis}\n" for axis in "xyz") + ("" if of_faces else colours)
    head += "element face 3\nproperty list uchar int vertex_indices\n" + (colours if of_faces else "") + "end_header\n"
    body, text = b"", ""
    for point, colour in zip(POINTS.tolist(), COLOURS.repeat(3, 0).tolist(), strict=True):
        extra = [] if of_faces else colour
        body += struct.pack(order + "3f", *point) + bytes(extra)
        text += " ".join(map(str, [*point, *extra])) + "\n"
    for face, colour in zip(FACES.tolist(), COLOURS.tolist(), strict=True):
        extra = colour if of_faces else []
        body += struct.pack(order + "B3i", 3, *face) + bytes(extra)
        text += " ".join(map(str, [3, *face, *extra])) + "\n"
    return head.encode() + (text.encode() if format == "ascii" else body)


def off(*, of_faces: bool = False) -> bytes:
    lines = ["OFF" if of_faces else "COFF", "# a comment", "9 3 0"]
    for point, colour in zip(POINTS.tolist(), COLOURS.repeat(3, 0).tolist(), strict=True):
        lines.append(" ".join(map(str, point if of_faces else [*point, *colour, 255])))
    for face, colour in zip(FACES.tolist(), COLOURS.tolist(), strict=True):
        lines.append(" ".join(map(str, [3, *face, *(colour if of_faces else [])])))
    return "\n".join(lines).encode()


def stl(points: np.ndarray[Any, Any] = POINTS) -> bytes:
    rows = np.zeros(len(points) // 3, np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("rest", "<u2")]))
    rows["corners"] = points.reshape(-1, 3, 3)
    return b"made by a test".ljust(80) + struct.pack("<I", len(rows)) + rows.tobytes()


def stl_text() -> bytes:
    lines = ["solid with a vertex in its name"]
    for face in FACES:
        lines += ["facet normal 0 0 1", "  outer loop"]
        lines += ["    vertex " + " ".join(map(str, point)) for point in POINTS[face].tolist()]
        lines += ["  endloop", "endfacet"]
    return "\n".join([*lines, "endsolid"]).encode()
