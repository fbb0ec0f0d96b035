import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from training.curves import draw, main, read_logs


def log(folder: Path, count: int, **terms: float) -> None:
    folder.mkdir(parents=True)
    lines = [
        {"step": 50 * n, "minutes": 0.1 * n, **{name: value / (n + 1) for name, value in terms.items()}}
        for n in range(count)
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def test_stages_are_drawn_one_after_the_other(tmp_path: Path) -> None:
    log(tmp_path / "run" / "video", 12, loss=-4.0, place=0.5, clip=0.6)
    log(tmp_path / "run" / "image", 20, loss=-4.0, place=0.9)
    assert [name for name, _ in read_logs(tmp_path / "run")] == ["image", "video"]
    draw(tmp_path / "run", tmp_path / "out" / "curves.png")
    with PIL.Image.open(tmp_path / "out" / "curves.png") as picture:
        assert np.asarray(picture.convert("RGB")).std() > 5
        assert picture.width > picture.height


def test_a_folder_without_a_log_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "x.png")]) == 2
    assert "no log.jsonl" in capsys.readouterr().err
