"""3D under shift: a shift of no strength changes nothing, levels do what they say, and the report says them all."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from media.mesh_parts import GREY
from media.mesh_views import DARKEST, LIGHT
from media.multiview import voxelize
from model import Tokenizer
from model.splat_decoder import SplatDecoder
from training.measured import mean_of, student_quantile
from training.shift_report import Measured, Outcome, Shown, summarize, write_report
from training.shift_study import Judge
from training.shifts import (
    GROUPS,
    SHIFTS,
    Drawn,
    Paint,
    Shift,
    Spoil,
    Surface,
    checks,
    draw,
    flat,
    hidden,
    lamp,
    noisy,
    painted,
    saturated,
    spread,
    swapped,
    tinted,
)
from training.study import main

BARS = ((1.0, 0.03, 0.04), (0.03, 0.4, 0.04))
"""Sides of the boxes of the meshes: thin, so that they fill few voxels."""
COLOURS = ((0.8, 0.2, 0.2), (0.2, 0.3, 0.9))
SIDE = 64


def bar(sides: tuple[float, float, float], first: int) -> tuple[list[list[float]], list[list[int]]]:
    """Corners and triangles of a box around the middle; first: number of its first corner."""
    corners = [[s * (bit - 0.5) for s, bit in zip(sides, (i & 1, i >> 1 & 1, i >> 2), strict=True)] for i in range(8)]
    squares = ((0, 2, 3, 1), (4, 5, 7, 6), (0, 1, 5, 4), (2, 6, 7, 3), (0, 4, 6, 2), (1, 3, 7, 5))
    return corners, [[first + s[0], first + s[a], first + s[a + 1]] for s in squares for a in (1, 2)]


def write_ply(path: Path, *, is_painted: bool) -> None:
    """A cross of two bars, red and blue or of no colour, in text."""
    rows, faces = [], []
    for sides, colour in zip(BARS, COLOURS, strict=True):
        corners, triangles = bar(sides, len(rows))
        rows += [[*corner, *(colour if is_painted else ())] for corner in corners]
        faces += triangles
    names = [*(f"float {axis}" for axis in "xyz"), *(f"float {c}" for c in ("red", "green", "blue") if is_painted)]
    head = ["ply", "format ascii 1.0", f"element vertex {len(rows)}", *(f"property {name}" for name in names)]
    head += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header"]
    lines = [*(" ".join(map(str, row)) for row in rows), *(" ".join(map(str, [3, *face])) for face in faces)]
    path.write_text("\n".join([*head, *lines]) + "\n")


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("meshes")
    write_ply(folder / "cross.ply", is_painted=True)
    write_ply(folder / "plain.ply", is_painted=False)
    return folder


@pytest.fixture(scope="module")
def cross(meshes: Path) -> Drawn:
    return draw(meshes / "cross.ply", 2, SIDE)


@pytest.fixture(scope="module")
def plain(meshes: Path) -> Drawn:
    return draw(meshes / "plain.ply", 2, SIDE)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(Tokenizer.load("tiny-continuous", device="cpu"), SplatDecoder.load("tiny-splats"), seed=0)


def shift(paint: Paint | None = None, spoil: Spoil | None = None, level: str = "x") -> Shift:
    return Shift(group="test", level=level, what="", paint=paint, spoil=spoil)


def cells(drawn: Drawn, spoil: Spoil) -> set[tuple[int, ...]]:
    given, _ = shift(spoil=spoil).apply(drawn, seed=0)
    return {tuple(row) for row in voxelize(given).coords.tolist()}


def test_no_strength_is_no_drop_and_some_is_some(judge: Judge, cross: Drawn) -> None:
    none = [
        shift(paint=lamp((1, 0, 0), 0.0), level="lamp"),
        shift(paint=saturated(1.0), level="saturation"),
        shift(spoil=noisy(0.0), level="noise"),
        shift(spoil=spread(24), level="views"),
        shift(spoil=hidden(0.0), level="hidden"),
    ]
    some = [shift(spoil=noisy(1.0), level="much noise"), shift(spoil=hidden(0.7), level="much hidden")]
    outcome, shown = judge.outcome(cross, [*none, *some])
    before = outcome.unshifted
    assert 10 < before.psnr < 60
    assert before.patches > 15
    for one in none:
        found = outcome.shifted[one.name]
        assert (found.psnr, found.ssim, found.snr) == (before.psnr, before.ssim, before.snr), one.name
        assert (found.lost, found.wrong, found.is_changed) == (0, 0, False)
    noise, dark = (outcome.shifted[one.name] for one in some)
    assert abs(before.psnr - noise.psnr) > 0.1
    assert noise.wrong > 0.5
    assert before.psnr - dark.psnr > 1
    assert (dark.lost > 0, dark.wrong) == (True, 0)
    assert [one.level for one in shown] == ["as drawn", *(one.level for one in (*none, *some))]
    assert shown[0].back.shape == (SIDE, SIDE, 3)


def test_fewer_views_and_more_hidden_never_add_voxels(plain: Drawn) -> None:
    for spoils in ([spread(count) for count in (24, 12, 6, 3)], [hidden(share) for share in (0, 0.1, 0.25, 0.5, 0.9)]):
        sets = [cells(plain, spoil) for spoil in spoils]
        for more, fewer in itertools.pairwise(sets):
            assert fewer <= more
        assert len(sets[-1]) < len(sets[0])


def test_noise_is_as_wide_as_it_says_and_the_same_for_the_same_seed(plain: Drawn) -> None:
    one = shift(spoil=noisy(0.5))
    given, wanted = one.apply(plain, seed=3)
    again, _ = one.apply(plain, seed=3)
    other, _ = one.apply(plain, seed=4)
    there = plain.given.depths[0] >= 0
    moved = np.concatenate([(a - b)[b >= 0] for a, b in zip(given.depths, plain.given.depths, strict=True)])
    assert moved.std() * 64 == pytest.approx(0.5, rel=0.05)
    assert np.array_equal(given.depths[0] >= 0, there)
    assert np.array_equal(given.depths[5], again.depths[5])
    assert not np.array_equal(given.depths[5], other.depths[5])
    _, unshifted = shift().apply(plain, seed=3)
    assert np.array_equal(wanted, unshifted), "what is wanted is the object without the noise"


def test_as_many_pixels_are_hidden_as_it_says(cross: Drawn) -> None:
    given, _ = shift(spoil=hidden(0.25)).apply(cross, seed=0)
    for image, depth, before in zip(given.images, given.depths, cross.given.depths, strict=True):
        assert (depth >= 0).sum() == pytest.approx(0.75 * (before >= 0).sum(), abs=1)
        assert not image[depth < 0].any()


def test_lamps_light_the_side_that_is_seen(plain: Drawn) -> None:
    """The drawing's own light, found again from the normals: they are right, and on the side of the camera."""

    def own(surface: Surface) -> np.ndarray:
        light = DARKEST + (1 - DARKEST) * (0.5 + 0.5 * (surface.normal @ LIGHT))
        return np.repeat((GREY * light)[:, None], 3, axis=1)

    again = painted(plain.given, plain.given_normals, own, is_painted=False)
    for image, before in zip(again.images, plain.given.images, strict=True):
        assert np.abs(image.astype(int) - before).max() <= 2
    from_left, from_right = (
        painted(plain.given, plain.given_normals, lamp((x, 0, 0), 1.0), is_painted=False) for x in (-1, 1)
    )
    means = [[int(image[..., 0].sum()) for image in views.images] for views in (from_left, from_right)]
    looks = plain.given.cameras.world_to_camera[:, 2, 0]  # 1: towards +x, so that the side of -x is seen
    assert np.corrcoef(looks, np.subtract(*means))[0, 1] > 0.9


def test_paints_do_what_they_say() -> None:
    colour = np.array([[0.8, 0.2, 0.2], [0.5, 0.5, 0.5]])
    place = np.array([[0.0, 0.0, 0.0], [0.03, 0.0, 0.0]])
    surface = Surface(colour=colour, albedo=colour, place=place, normal=np.array([[0, 0, 1.0], [0, 0, -1.0]]))
    assert tinted((0.5, 1, 0))(surface)[0].tolist() == pytest.approx([0.4, 0.2, 0])
    assert np.ptp(saturated(0)(surface), axis=1).tolist() == pytest.approx([0, 0])
    assert np.ptp(saturated(2)(surface)[0]) == pytest.approx(2 * np.ptp(colour[0]))
    assert swapped(surface).tolist() == [[0.2, 0.8, 0.2], [0.5, 0.5, 0.5]]
    assert (flat(surface) == 0.5).all()
    assert (checks(1 / 32)(surface)[0] != checks(1 / 32)(surface)[1]).all()
    assert (checks(1.0)(surface)[0] == checks(1.0)(surface)[1]).all()
    lit = lamp((0, 0, 2), 1.0)(surface)
    assert lit[0].tolist() == pytest.approx([0.8, 0.2, 0.2])
    assert lit[1].tolist() == pytest.approx([0.125] * 3)


def test_paint_changes_what_is_wanted_and_spoiling_does_not(cross: Drawn) -> None:
    for one in SHIFTS:
        given, wanted = one.apply(cross, seed=0)
        _, plain = shift().apply(cross, seed=0)
        assert np.array_equal(wanted, plain) == (one.paint is None), one.name
        is_other = len(given.images) < 24 or any(
            not np.array_equal(a, b)
            for a, b in zip([*given.images, *given.depths], [*cross.given.images, *cross.given.depths], strict=True)
        )
        assert is_other, f"{one.name} changes nothing"


def test_an_object_that_fills_no_voxel_is_black(judge: Judge, cross: Drawn) -> None:
    outcome, _ = judge.outcome(cross, [shift(spoil=hidden(1.0))])
    (gone,) = outcome.shifted.values()
    assert (gone.lost, gone.wrong, gone.voxels) == (1, 0, 0)
    assert math.isnan(gone.patches)
    assert gone.psnr < outcome.unshifted.psnr


def outcomes_of(drops: list[float]) -> list[Outcome]:
    found = []
    for number, drop in enumerate(drops):
        before = Measured(psnr=25.0 + number, ssim=0.9, snr=15.0, patches=30.0, voxels=100)
        after = replace(before, psnr=before.psnr - drop, ssim=0.8, lost=0.25, wrong=0.5)
        found.append(
            Outcome(
                name=f"mesh{number}",
                is_painted=number > 0,
                unshifted=before,
                shifted={one.name: after for one in SHIFTS},
            )
        )
    return found


def test_means_have_intervals_over_the_objects_that_change() -> None:
    outcomes = outcomes_of([1.0, 2.0, 6.0])
    first = SHIFTS[0].name
    outcomes[0].shifted[first] = replace(outcomes[0].unshifted, is_changed=False)
    changed, whole, *_ = summarize(outcomes, SHIFTS)
    assert (changed.drop.value, changed.drop.count) == (pytest.approx(4.0), 2)
    assert changed.drop.half == pytest.approx(12.706 * 2.0)
    assert whole.drop.value == pytest.approx(3.0)
    assert whole.drop.half == pytest.approx(4.303 * math.sqrt(7 / 3))
    assert whole.worst == "mesh2"
    # Tables of Student's t: 11, 25 and 100 degrees of freedom.
    for freedom, quantile in ((1, 12.706), (11, 2.201), (25, 2.060), (100, 1.984)):
        assert student_quantile(freedom) == pytest.approx(quantile, abs=1e-3)
    assert mean_of([math.nan]).text() == "-"


def test_the_report_names_every_level_and_its_reference(tmp_path: Path) -> None:
    outcomes = outcomes_of([1.0, 2.0, 6.0])
    picture = np.full((16, 16, 3), 90, np.uint8)
    pictures = [Shown(one.group, one.level, picture, picture // 2, 20.0) for one in (shift(), *SHIFTS)]
    text = write_report(tmp_path, {"seed": "0"}, outcomes, summarize(outcomes, SHIFTS), pictures, "mesh2").read_text()
    for one in SHIFTS:
        assert f"| {one.group} | {one.level} | 3 | 23.00 | +3.00 (-3.57 to +9.57) | " in text
        assert one.what in text
    for group in GROUPS:
        of_object = group in ("light", "material")
        assert f"- **{group}**: the {'' if of_object else 'un'}shifted object" in text
        assert of_object == (f"| {group} | {next(s.level for s in SHIFTS if s.group == group)} | 25.0" not in text)
    for name in ("drops.png", "breaks.png"):
        assert np.asarray(PIL.Image.open(tmp_path / name)).std() > 5


def test_the_command_measures_and_reports(meshes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["shift", "--meshes", str(meshes), "--out", str(tmp_path), "--shifts", "material"]
    assert main([*words, "--held-out", "1", "--side", "24", "--device", "cpu"]) == 0
    assert f"report in {tmp_path / 'report.md'}" in capsys.readouterr().out
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["seeds"] == [0]
    assert record["arguments"]["shifts"] == ["material"]
    assert record["environment"]["torch"]
    levels = {(level["group"], level["level"]): level for level in record["levels"]}
    assert set(levels) == {(one.group, one.level) for one in SHIFTS if one.group == "material"}
    assert levels["material", "swapped"]["objects"] == 1, "a grey cross has no hues"
    assert [one["name"] for one in record["objects"]] == ["cross.ply", "plain.ply"]
    assert all(level["wrong"]["mean"] == 0 for level in record["levels"])
    assert "1 of them painted" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--meshes", "{}/none"], "no such folder"),
        (["--meshes", "{}"], "no asset in it"),
        (["--meshes", "{}/broken"], "broken.ply: "),
        (["--model", "nobody"], "no bundled model"),
        (["--model", "{splats}"], "tiny-splats"),
        (["--splats", "{model}"], "keys that do not fit"),
        (["--show", "other.ply"], "--show other.ply"),
        (["--count", "0"], "1 or more"),
        (["--shifts", "weather"], "weather"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], line: str, meshes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    (empty / "broken").mkdir(parents=True) if "broken" in words[1] else empty.mkdir()
    if "broken" in words[1]:
        (empty / "broken" / "broken.ply").write_text("ply\nformat ascii 1.0\nend_header\n")
    bundled = Path("model/bundled")
    files = {"{splats}": bundled / "splats/tiny-splats.safetensors", "{model}": bundled / "tiny-continuous.safetensors"}
    words = [str(files.get(word, word)).replace("{}", str(empty)) for word in words]
    if "--meshes" not in words:
        words += ["--meshes", str(meshes)]
    try:
        status = main(["shift", *words, "--out", str(tmp_path / "out")])
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr()
    assert status == 2
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert line in said.err


@pytest.mark.parametrize("words", [["nobody"], [], ["--steps", "3", "shift"]])
def test_unknown_studies_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
