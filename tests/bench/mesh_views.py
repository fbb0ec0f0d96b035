"""What drawing a mesh for voxelize costs, and how much of its surface so many views of such a side find.

    python -m tests.bench.mesh_views FOLDER [--recall NAME ...]
    python -m tests.bench.mesh_views --faces 977000 1440000

The first table: every mesh of the folder, drawn as the service draws it. The second: the named meshes, by views and
side. Recall is of the cells that 128 views of 640 show, drawn by the same rasteriser from other places; precision is
against those and the cells that points strewn over the triangles meet, which also holds what no camera sees. CPU
seconds, because the machine may be shared. With --faces instead: wall seconds of spheres with so many triangles, as
PLY, through a decoder child of the service, under its limits.
"""

import argparse
import asyncio
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import trimesh

from media.archive import open_archive
from media.asset_sniff import asset_format
from media.decode import decode_media
from media.limits import Limits
from media.mesh import load_mesh, load_mesh_archive
from media.mesh_views import SIDE, VIEWS, normalize, render_views, sphere_cameras
from media.multiview import GRID, voxelize
from media.pool import MediaPool
from media.types import Asset, Mesh

LIMITS = Limits.local()
RECALL = (
    "pv_nut.ply",
    "blendswap_cc_by_toytrain.zip",
    "reallusion_female03.glb",
    "blendswap_cc_by_succulentplant.glb",
    "scopia_bicycle.glb",
)
POINTS = 4_000_000


def main() -> None:
    """Print one or two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--recall", nargs="*", default=RECALL)
    parser.add_argument("--faces", type=int, nargs="+")
    given = parser.parse_args()
    if given.faces:
        asyncio.run(print_children(given.faces))
        return
    if given.folder is None:
        parser.error("name a folder of meshes, or --faces")
    paths = [path for path in sorted(given.folder.rglob("*")) if path.is_file() and asset_format(path.read_bytes())]
    meshes = sorted(((path.name, read(path)) for path in paths), key=lambda pair: len(pair[1].faces))
    print("| mesh | faces | draw s | voxelize s | voxels |\n|---|---|---|---|---|")
    for name, mesh in meshes:
        coords, draw_s, voxelize_s = measure(mesh, VIEWS, SIDE)
        print(f"| {name} | {len(mesh.faces)} | {draw_s:.2f} | {voxelize_s:.2f} | {len(coords)} |", flush=True)
    chosen = [mesh for name, mesh in meshes if name in given.recall]
    if chosen:
        print_recall(chosen)


async def print_children(counts: Sequence[int]) -> None:
    print("| faces | MB | seconds in a child | voxels |\n|---|---|---|---|")
    async with MediaPool(Limits(), 1) as pool:
        await pool.start()
        for count in counts:
            rows = round(math.sqrt(count) / 2)  # of twice as many quads
            mesh = trimesh.creation.uv_sphere(count=[rows, rows])
            data = mesh.export(file_type="ply", vertex_normal=False)
            assert isinstance(data, bytes)
            start = time.perf_counter()
            asset = await pool.run(decode_media, data, pool.limits)
            seconds = time.perf_counter() - start
            assert isinstance(asset, Asset)
            print(
                f"| {len(mesh.faces)} | {len(data) / 1e6:.1f} | {seconds:.1f} | {len(asset.voxels.coords)} |",
                flush=True,
            )


def print_recall(meshes: list[Mesh]) -> None:
    known = [(marked(visible(mesh)), marked(strewn(mesh))) for mesh in meshes]
    print("\n| views | side | recall mean | least | precision least | draw s mean | voxelize s mean |")
    print("|---|---|---|---|---|---|---|")
    for views in (12, 16, 24, 32):
        for side in (256, 384, 512):
            rows = []
            for mesh, (seen, surface) in zip(meshes, known, strict=True):
                coords, *seconds = measure(mesh, views, side)
                found = marked(coords)
                recall = (found & seen).sum() / seen.sum()
                rows.append((recall, (found & (seen | surface)).sum() / found.sum(), *seconds))
            recall, precision, draw_s, voxelize_s = np.array(rows).T
            print(
                f"| {views} | {side} | {recall.mean():.3f} | {recall.min():.3f} | {precision.min():.4f} "
                f"| {draw_s.mean():.2f} | {voxelize_s.mean():.2f} |",
                flush=True,
            )


def read(path: Path) -> Mesh:
    data = path.read_bytes()
    format = asset_format(data) or ""
    if format == "zip":
        return normalize(load_mesh_archive(open_archive(data, LIMITS), LIMITS))
    return normalize(load_mesh(data, format, LIMITS))


def measure(mesh: Mesh, views: int, side: int) -> tuple[npt.NDArray[np.int32], float, float]:
    """The voxels' coordinates, [n, 3], and CPU seconds of drawing and of voxelize."""
    start = time.process_time()
    drawn = render_views(mesh, sphere_cameras(views), side)
    middle = time.process_time()
    return voxelize(drawn).coords, middle - start, time.process_time() - middle


def visible(mesh: Mesh) -> npt.NDArray[np.int32]:
    parts = [sphere_cameras(16, turn=math.pi * (2 * part + 1) / 16) for part in range(8)]
    return np.concatenate([voxelize(render_views(mesh, cameras, 640)).coords for cameras in parts])


def strewn(mesh: Mesh) -> npt.NDArray[np.int32]:
    """Cells of points spread evenly over the triangles; a cell that the surface only grazes may be missing."""
    rng = np.random.default_rng(0)
    corners = mesh.vertices.astype(np.float64)[mesh.faces]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    owner = corners[rng.choice(len(corners), POINTS, p=area / area.sum())]
    root, across = np.sqrt(rng.random((POINTS, 1))), rng.random((POINTS, 1))
    points = owner[:, 0] * (1 - root) + owner[:, 1] * root * (1 - across) + owner[:, 2] * root * across
    cells: npt.NDArray[np.int32] = np.floor((points + 0.5) * GRID).astype(np.int32)
    return cells


def marked(coords: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    cells = np.zeros((GRID, GRID, GRID), bool)
    cells[tuple(coords.T)] = True
    return cells


if __name__ == "__main__":
    main()
