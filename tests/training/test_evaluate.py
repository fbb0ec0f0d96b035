"""The command: what it runs, and one line and status 2 for what cannot be."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

from tests.paths import ROOT
from tests.training.conftest import scene
from tests.training.small_siglip2 import save_text_tower
from training.evaluate import main
from training.protocols import PROTOCOLS
from training.word_protocols import WORD_PROTOCOLS


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    (folder / "dog").mkdir()
    for index in range(2):
        PIL.Image.fromarray(scene(index, 40, 48)).save(folder / "dog" / f"{index}.png")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_without_a_protocol_the_held_out_split(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model beside PCA and JPEG; an empty table of clips where there are none."""
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "images" / "eval").mkdir()
    PIL.Image.fromarray(scene(40, 70, 90)).save(tmp_path / "data" / "images" / "eval" / "a.png")
    assert main(["tiny-discrete", "--data", str(tmp_path / "data"), "--side", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"tiny-discrete [0-9a-f]{12}, eval, centre 64 px", lines[0])
    assert lines[1:3] == ["", f"{'images':34} {'n':>4} {'PSNR':>7} {'SSIM':>7}"]
    assert lines[7:] == ["", f"{'clips of 16 frames':34} {'n':>4} {'PSNR':>7} {'SSIM':>7}"]
    names = [line[:34].strip() for line in lines[3:7]]
    assert names == ["PCA 48, pictures alike", "PCA 48, all patches alike", "JPEG, 12 bytes a patch", "tiny-discrete"]
    assert all(re.fullmatch(r" +1 +\d+\.\d\d +0\.\d{4}", line[34:]) for line in lines[3:7])


def test_the_module_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "training.evaluate", "tiny-continuous", "--protocol", "best", "--data", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: protocol 'best'; there are {', '.join([*PROTOCOLS, *WORD_PROTOCOLS])}\n"


def test_missing_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, absent = str(tmp_path), str(tmp_path / "absent")
    assert "no images" in refused(capsys, "tiny-continuous", "--data", absent)
    for name in [*PROTOCOLS, *WORD_PROTOCOLS]:
        protocol = ("tiny-continuous", "--protocol", name)
        assert refused(capsys, *protocol, "--data", absent).endswith("absent: no such folder")
        assert re.search(r": no (image|video|asset) in it \(\.", refused(capsys, *protocol, "--data", there))
        assert refused(capsys, *protocol) == f"error: {name} wants --data DIR"


def test_all_missing_networks_at_once(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"--inception": "a.pt", "--lpips-vgg": "b.pth", "--lpips-heads": "c.pth", "--i3d": "d.pt"}
    line = refused(
        capsys,
        *("tiny-continuous", "--protocol", "imagenet-256", "--data", str(pictures), "--device", "cpu"),
        *(word for pair in options.items() for word in pair),
    )
    assert all(f"{name}: no such file" in line for name in options.values())
    assert line.count("curl -L") == len(options)


def test_text_towers_that_are_missing_or_another_models(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("tiny-continuous", "--protocol", "zero-shot", "--data", str(pictures), "--device", "cpu")
    assert "text tower: not given. SigLIP 2, both towers: hf download" in refused(capsys, *arguments)
    absent = str(tmp_path / "absent")
    assert "text tower: nothing at " in refused(capsys, *arguments, "--text-tower", absent)
    tower, whole = save_text_tower(tmp_path / "siglip2", 32), save_text_tower(tmp_path / "whole", 144)
    capsys.readouterr()  # the library shows its progress
    line = refused(capsys, *arguments, "--text-tower", str(tower))
    assert "its texts have 32 values, the embeddings of the model 144" in line
    weights = whole / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "whole" in refused(capsys, *arguments, "--text-tower", str(whole))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--inception", "x.pt"], "--inception is no option of a run without --protocol"),
        (["--limit", "3"], "--limit is no option of a run without --protocol"),
        (["--protocol", "plain", "--split", "eval"], "--split is no option of plain"),
        (["--protocol", "coco-retrieval", "--prompts", "clip"], "--prompts is no option of coco-retrieval"),
        (["--protocol", "zero-shot", "--i3d", "x.pt"], "--i3d is no option of zero-shot"),
        (["--protocol", "zero-shot", "--prompts", "best"], "prompts 'best'; there are clip, short, plain"),
        (["--protocol", "zero-shot", "--side", "100"], "side 100; wanted a multiple of 16 pixels"),
        (["--protocol", "coco-retrieval"], "no captions.json and no NAME.txt in it; name a file with --captions"),
        (["--protocol", "retrieval", "--captions", "absent.json"], "No such file or directory: 'absent.json'"),
        (["--protocol", "msrvtt-retrieval", "--kind", "image"], "a protocol of kind video, not image"),
    ],
)
def test_options_that_do_not_go_together(
    pictures: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    """An option that has no say must not look as if it had."""
    assert said in refused(capsys, "tiny-continuous", "--data", str(pictures), *arguments)
