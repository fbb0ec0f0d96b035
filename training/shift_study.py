"""3D under shift: what of an object survives tokens and Gaussians when light, materials, depth or views change.

`python -m training.study shift` draws meshes as serving does, shifts what was drawn, encodes, decodes, and scores
held-out views. It trains nothing. V views, S side of a picture.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from media.errors import MediaError
from media.multiview import GRID, Views, voxelize
from media.types import Int32Array, UInt8Array, Voxels
from model import Tokenizer
from model.errors import ModelError
from model.image_metrics import WINDOW, psnr, ssim
from model.splat_decoder import SplatDecoder
from training.eval_items import find_items
from training.evaluation import views_of
from training.gaussians import HELD_OUT, SCORED_SIDE, Object
from training.measured import Parser, add_common, at_least, command, minutes_since, model_line, say, write_json
from training.shift_report import Measured, Outcome, Shown, Summary, summarize, write_report
from training.shifts import GROUPS, SHIFTS, Drawn, Shift, draw, read_mesh

COUNT = 6
"""Meshes without --count: about twenty minutes of a core."""

LEAST_ERROR = 1e-10
"""Mean square error under it counts as it: equal pictures are 100 dB."""


@dataclass(frozen=True)
class Coded:
    """What came of given views. voxels: as made, None where the object filled none; views: uint8 [V, S, S, 3]."""

    voxels: Voxels | None
    patches: float
    views: UInt8Array


class Judge:
    """Codes and scores drawn objects. seed: of what the shifts leave to chance."""

    def __init__(self, tokenizer: Tokenizer, splats: SplatDecoder, seed: int) -> None:
        self.tokenizer = tokenizer
        self.splats = splats
        self.seed = seed

    def outcome(self, drawn: Drawn, shifts: Sequence[Shift]) -> tuple[Outcome, list[Shown]]:
        """Measure an object at every shift; also one view of each, wanted beside what came back."""
        plain = Shift(group="unshifted", level="as drawn", what="")
        _, wanted = plain.apply(drawn, self.seed)
        coded = self.code(drawn.given, drawn)
        if coded.voxels is None:
            raise ValueError(f"{drawn.name}: the object fills no voxel")
        base = coded.voxels.coords
        unshifted = _score(coded, wanted, base)
        outcome = Outcome(name=drawn.name, is_painted=drawn.is_painted, unshifted=unshifted)
        view = max(0, len(wanted) // 2 - 1)  # a little above the horizon
        shown = [Shown(plain.group, plain.level, wanted[view], coded.views[view], unshifted.psnr)]
        for shift in shifts:
            given, target = shift.apply(drawn, self.seed)
            if _is_same(given, drawn.given) and np.array_equal(target, wanted):
                measured, back = replace(unshifted, is_changed=False), coded
            else:
                back = self.code(given, drawn)
                measured = _score(back, target, base)
            outcome.shifted[shift.name] = measured
            shown.append(Shown(shift.group, shift.level, target[view], back.views[view], measured.psnr))
        return outcome, shown

    def code(self, given: Views, drawn: Drawn) -> Coded:
        """Voxels of the given views through the tokenizer and the Gaussian decoder, seen from the held-out cameras."""
        cameras = drawn.held.cameras
        side = len(drawn.held.images[0]) // 2
        black = np.zeros((len(cameras), side, side, 3), np.uint8)
        try:
            voxels = voxelize(given)
        except MediaError as error:
            if error.code != "empty_object":
                raise
            return Coded(None, float("nan"), black)
        output = "codes" if "codes" in self.tokenizer.outputs else "latents"
        (back,) = self.tokenizer.decode(self.tokenizer.encode([voxels], [output]))
        assert isinstance(back, Voxels)
        error_of = float(np.square(back.feats.astype(np.float64) - voxels.feats).mean())
        item = Object(
            name=drawn.name,
            feats=2 * torch.from_numpy(voxels.feats) - 1,
            decoded=2 * torch.from_numpy(back.feats) - 1,
            coords=pad(torch.from_numpy(voxels.coords).long(), (1, 0)),
            pictures=torch.from_numpy(black),
            world_to_camera=torch.from_numpy(cameras.world_to_camera),
            intrinsics=torch.from_numpy(cameras.intrinsics),
        )
        return Coded(voxels, _decibels(1.0, error_of), views_of(self.splats.net, item, item.decoded))


def _score(coded: Coded, wanted: UInt8Array, base: Int32Array) -> Measured:
    seen, target = _floats(coded.views), _floats(wanted)
    power = target.square().mean(dim=(1, 2, 3)).clamp(min=LEAST_ERROR)
    decibels = psnr(seen, target).clamp(max=_decibels(1.0, 0.0))
    lost, wrong, count = 1.0, 0.0, 0
    if coded.voxels is not None:
        there, was = _flat(coded.voxels.coords), _flat(base)
        count = len(there)
        lost = len(np.setdiff1d(was, there)) / len(was)
        wrong = len(np.setdiff1d(there, was)) / len(was)
    return Measured(
        psnr=float(decibels.mean()),
        ssim=float(ssim(seen, target).mean()),
        snr=float((decibels + 10 * power.log10()).mean()),
        patches=coded.patches,
        voxels=count,
        lost=lost,
        wrong=wrong,
    )


def _floats(pictures: UInt8Array) -> Tensor:
    return torch.from_numpy(pictures).double() / 255


def _decibels(power: float, error: float) -> float:
    return float(10 * np.log10(power / max(error, LEAST_ERROR)))


def _flat(coords: Int32Array) -> Int32Array:
    flat: Int32Array = (coords[:, 0] * GRID + coords[:, 1]) * GRID + coords[:, 2]
    return flat


def _is_same(one: Views, other: Views) -> bool:
    return len(one.images) == len(other.images) and all(
        np.array_equal(a, b) for a, b in zip([*one.images, *one.depths], [*other.images, *other.depths], strict=True)
    )


def run(
    paths: Sequence[Path],
    judge: Judge,
    shifts: Sequence[Shift],
    *,
    views: int = HELD_OUT,
    side: int = SCORED_SIDE,
    show: str | None = None,
    log: Callable[[str], None] = say,
) -> tuple[list[Outcome], list[Shown], str]:
    """Every mesh at every shift; also the pictures and the name of one: `show`, or the first that most levels change.

    Raises ValueError for a file that cannot be read: a mean over fewer objects would be another mean.
    """
    outcomes: list[Outcome] = []
    pictures: list[Shown] = []
    shown_name, most = "", -1
    for number, path in enumerate(paths):
        began = time.monotonic()
        drawn = draw(path, views, side)
        outcome, shown = judge.outcome(drawn, shifts)
        outcomes.append(outcome)
        changed = sum(measured.is_changed for measured in outcome.shifted.values())
        if drawn.name == show or (show is None and changed > most):
            pictures, shown_name, most = shown, drawn.name, changed
        log(
            f"{number + 1}/{len(paths)} {drawn.name}: {outcome.unshifted.voxels} voxels, "
            f"{outcome.unshifted.psnr:.2f} dB unshifted, {time.monotonic() - began:.0f} s"
        )
    return outcomes, pictures, shown_name


def main(arguments: Sequence[str]) -> int:
    """Run the study; returns the exit status."""
    given = _parser().parse_args(arguments)
    began = time.monotonic()
    torch.set_num_threads(given.threads)
    try:
        found = find_items(given.meshes, "asset", given.count)
        if given.show is not None and given.show not in {path.name for path in found.paths}:
            raise ValueError(f"--show {given.show}: not among the {len(found.paths)} meshes of this run")
        tokenizer = Tokenizer.load(given.model, device=given.device, dtype=given.dtype)
        splats = SplatDecoder.load(given.splats, device=tokenizer.device)
        given.out.mkdir(parents=True, exist_ok=True)
        for path in found.paths:
            read_mesh(path)  # now rather than after hours
        shifts = [shift for shift in SHIFTS if shift.group in given.shifts]
        judge = Judge(tokenizer, splats, given.seed)
        outcomes, pictures, name = run(
            found.paths, judge, shifts, views=given.held_out, side=given.side, show=given.show
        )
        summaries = summarize(outcomes, shifts)
        line = command("shift", arguments)
        settings = {
            "model": model_line(tokenizer),
            "Gaussian decoder": f"{splats.name}, weights {splats.revision[:12]}",
            "meshes": f"{found}, {sum(outcome.is_painted for outcome in outcomes)} of them painted, the others drawn "
            "grey under a light from above",
            "given": "24 views of 256 pixels with depth, as serving draws them",
            "scored": f"{given.held_out} held-out views of {given.side} pixels, on black",
            "seed": f"{given.seed}, of noise and of what is hidden",
            "minutes": minutes_since(began),
            "command": f"`{line}`",
        }
        path = write_report(given.out, settings, outcomes, summaries, pictures, name)
        write_json(given.out, "shift", line, given, _record(tokenizer, splats, outcomes, summaries, settings))
    except (OSError, ValueError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report in {path}")
    return 0


def _record(
    tokenizer: Tokenizer,
    splats: SplatDecoder,
    outcomes: Sequence[Outcome],
    summaries: Sequence[Summary],
    settings: dict[str, str],
) -> dict[str, object]:
    return {
        "model": {"name": tokenizer.name, "revision": tokenizer.revision},
        "gaussian_decoder": {"name": splats.name, "revision": splats.revision},
        "settings": settings,
        "levels": [summary.to_json() for summary in summaries],
        "objects": [
            {
                "name": outcome.name,
                "is_painted": outcome.is_painted,
                "unshifted": _plain(outcome.unshifted),
                "shifted": {name: _plain(measured) for name, measured in outcome.shifted.items()},
            }
            for outcome in outcomes
        ],
    }


def _plain(measured: Measured) -> dict[str, float | None]:
    return {name: None if value != value else value for name, value in vars(measured).items()}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m training.study shift", description="3D under shift; trains nothing.")
    parser.add_argument("--meshes", type=Path, default=Path("../shared/data/meshes/eval"), help="folder of mesh files")
    parser.add_argument("--splats", default="tiny-splats", help="Gaussian decoder, bundled name or weights file")
    parser.add_argument(
        "--shifts",
        nargs="+",
        choices=GROUPS,
        default=list(GROUPS),
        metavar="KIND",
        help=f"only some of {', '.join(GROUPS)}",
    )
    parser.add_argument("--held-out", type=at_least(1), default=HELD_OUT, metavar="N", help="views that are scored")
    parser.add_argument("--side", type=at_least(WINDOW), default=SCORED_SIDE, help="of a held-out view, in pixels")
    parser.add_argument(
        "--show", metavar="FILE", help="the mesh in the picture; default the first that most levels change"
    )
    add_common(parser, "shift", COUNT)
    return parser
