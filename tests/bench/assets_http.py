"""Every mesh of a folder through a running service: encode, decode to PLY, a view, and the round trip's quality.

    atoken serve &
    python -m tests.bench.assets_http ../shared/data/meshes [--url http://127.0.0.1:8000] [--sheet FILE.png]

One request after the other. Seconds are a client's; the mesh's drawing and its six held-out views are in them. PLY, STL
and OFF say nothing of which axis is up: those of ../shared/data are y up, but for the ones named here.
"""

import argparse
import base64
import io
import statistics
import time
from pathlib import Path

import httpx
from PIL import Image

from media.archive import open_archive
from media.asset_sniff import asset_format
from media.limits import Limits
from media.mesh import load_mesh, load_mesh_archive

LIMITS = Limits()
TOKEN_FILE = "application/vnd.safetensors"
Z_UP = {"pv_airplane.ply", "blendswap_cc_by_surveillancecamera.stl"}
"""Of the files without an axis: seen in the sheet."""

VIEW_SIDE, COLUMNS = 128, 10


def main() -> None:
    """Print a Markdown table and its sums."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--sheet", type=Path, help="a picture of all views, to look at")
    given = parser.parse_args()
    client = httpx.Client(base_url=given.url, timeout=120.0, trust_env=False, headers={"Request-Timeout": "110"})
    print("| mesh | faces | voxels = tokens | encode s | PLY s | MB | view s | PSNR dB | SSIM |")
    print("|---|---|---|---|---|---|---|---|---|")
    scores: list[tuple[float, float]] = []
    views: list[Image.Image] = []
    refused = 0
    for path in sorted(given.folder.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        if asset_format(data) is None:
            continue
        up = {"up": "z" if path.name in Z_UP else "y"} if path.suffix in (".ply", ".stl", ".off") else {}
        start = time.perf_counter()
        answer = client.post("/encode", content=data, headers={"Accept": TOKEN_FILE}, params=up)
        encode_s = time.perf_counter() - start
        if answer.status_code != 200:
            refused += 1
            print(
                f"| {path.name} | refused: {answer.status_code} {answer.json()['detail']} | | | | | | | |", flush=True
            )
            continue
        start = time.perf_counter()
        ply = client.post("/decode", content=answer.content, headers={"Accept": "model/ply"})
        ply_s = time.perf_counter() - start
        start = time.perf_counter()
        view = client.post("/decode", content=answer.content, headers={"Accept": "image/png"}, params={"side": 256})
        view_s = time.perf_counter() - start
        item = client.post("/encode", content=data, params={"outputs": "reconstruction", **up}).json()["items"][0]
        assert ply.status_code == view.status_code == 200, (ply.text[:200], view.text[:200])
        found = item["reconstruction"]
        scores.append((found["psnr_db"], found["ssim"]))
        assert base64.b64decode(found["data"]).startswith(b"ply")
        views.append(Image.open(io.BytesIO(view.content)).resize((VIEW_SIDE, VIEW_SIDE)))
        print(
            f"| {path.name} | {_faces(data)} | {item['tokens']} | {encode_s:.2f} | {ply_s:.2f} "
            f"| {len(ply.content) / 1e6:.1f} | {view_s:.2f} | {found['psnr_db']:.2f} | {found['ssim']:.3f} |",
            flush=True,
        )
    if given.sheet:
        sheet = Image.new("RGB", (COLUMNS * VIEW_SIDE, -(-len(views) // COLUMNS) * VIEW_SIDE))
        for number, shown in enumerate(views):
            sheet.paste(shown, (number % COLUMNS * VIEW_SIDE, number // COLUMNS * VIEW_SIDE))
        sheet.save(given.sheet)
    mean = [statistics.mean(values) for values in zip(*scores, strict=True)]
    print(f"\n{len(scores)} meshes, {refused} refused; mean PSNR {mean[0]:.2f} dB, SSIM {mean[1]:.3f}")


def _faces(data: bytes) -> int:
    format = asset_format(data) or ""
    mesh = load_mesh_archive(open_archive(data, LIMITS), LIMITS) if format == "zip" else load_mesh(data, format, LIMITS)
    return len(mesh.faces)


if __name__ == "__main__":
    main()
