"""The commands that work without a server, on the bundled models, in this process."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from media.image import decode_image, encode_image
from media.limits import Limits
from media.ply import decode_ply
from media.tokens import dump_tokens, load_tokens
from media.types import Image, UInt8Array
from media.video import decode_video, encode_video
from model import Tokenizer
from model.tokenizer import BUNDLED
from service.cli import main as cli
from service.cli.errors import explain
from service.cli.model_names import check_models
from tests.media.meshes import arms_glb

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `atoken` with these arguments; give exit status, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["atoken", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def waves(height: int, width: int, frame: int = 0) -> UInt8Array:
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    planes = [128 + 80 * np.sin(rows / (9 + c) + frame / 5) * np.cos(columns / (12 - c)) for c in range(3)]
    return np.asarray(np.stack(planes, axis=-1), np.uint8)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "waves.png"
    path.write_bytes(encode_image(waves(70, 101)))
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "waves.mkv"
    path.write_bytes(encode_video(np.stack([waves(34, 50, t) for t in range(21)]), 12.0, "mkv"))
    return path


def psnr(a: UInt8Array, b: UInt8Array) -> float:
    return float(-10 * np.log10(np.mean((a.astype(float) - b.astype(float)) ** 2) / 255**2))


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "npy"])
def test_a_picture_to_tokens_and_back(run: Run, picture: Path, tmp_path: Path, suffix: str) -> None:
    tokens, back = tmp_path / "a.tokens", tmp_path / f"back.{suffix}"
    status, out, _ = run("encode", picture, "-o", tokens)
    assert status == 0
    assert "1 item, 35 tokens" in out
    [item] = load_tokens(tokens.read_bytes())
    assert (item.model, item.layout.height, item.layout.width) == ("tiny-continuous", 70, 101)
    status, out, _ = run("decode", tokens, "-o", back)
    assert (status, out.strip()) == (0, f"{back}: 101 x 70 pixels")
    pixels = np.load(back) if suffix == "npy" else decode_image(back.read_bytes(), Limits()).pixels
    assert psnr(pixels, waves(70, 101)) > 25


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "npy"])
def test_a_clip_to_codes_and_back(run: Run, clip: Path, tmp_path: Path, suffix: str) -> None:
    tokens, back = tmp_path / "a.tokens", tmp_path / f"back.{suffix}"
    assert run("encode", clip, "-o", tokens, "--model", "tiny-discrete")[0] == 0
    [item] = load_tokens(tokens.read_bytes())
    assert item.codes is not None
    assert item.codes.shape == (6 * 3 * 4, 8)
    status, out, _ = run("decode", tokens, "-o", back)
    assert (status, out.strip()) == (0, f"{back}: 21 frames of 50 x 34 pixels")
    if suffix == "npy":
        frames = np.load(back)
    else:
        video = decode_video(back.read_bytes(), Limits())
        assert video.fps == pytest.approx(12.0)
        frames = video.frames
    assert frames.shape == (21, 34, 50, 3)
    assert psnr(frames, np.stack([waves(34, 50, t) for t in range(21)])) > 18


def test_files_of_all_kinds_in_one_go_keep_their_order(run: Run, picture: Path, clip: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "all.tokens"
    status, out, _ = run(
        *("encode", picture, clip, picture, "-o", tokens, "--outputs", "latents,embedding", "--threads", 1)
    )
    assert status == 0
    assert "3 items" in out
    items = load_tokens(tokens.read_bytes())
    assert [item.layout.kind for item in items] == ["image", "video", "image"]
    assert all(item.embedding is not None for item in items)
    alone = Tokenizer.load("tiny-continuous", device="cpu").encode([Image(pixels=waves(70, 101))])[0]
    np.testing.assert_allclose(items[2].latents, alone.latents, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]

    status, out, err = run("decode", tokens, "-o", tmp_path / "back.png")
    assert status == 1
    assert "item 1 of all.tokens is a clip" in err
    assert ".mp4 .mkv .npy" in err
    status, out, _ = run("decode", tokens, "-o", tmp_path / "back.npy")
    assert status == 0
    assert [np.load(tmp_path / f"back-{i}.npy").ndim for i in range(3)] == [3, 4, 3]


def test_crop_drops_what_fills_no_patch(run: Run, picture: Path, clip: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "a.tokens"
    assert run("encode", picture, clip, "-o", tokens, "--fit", "crop")[0] == 0
    sizes = [(item.layout.frames, item.layout.height, item.layout.width) for item in load_tokens(tokens.read_bytes())]
    assert sizes == [(1, 64, 96), (20, 32, 48)]


def test_embeddings_for_people_for_programs_and_as_an_array(
    run: Run, picture: Path, clip: Path, tmp_path: Path
) -> None:
    status, out, _ = run("embed", picture, clip, picture, "--json", "-o", tmp_path / "e.npy")
    assert status == 0
    found = json.loads(out)
    assert [row["file"] for row in found["items"]] == [str(picture), str(clip), str(picture)]
    values = np.array([row["embedding"] for row in found["items"]])
    assert values.shape == (3, 144)
    np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(values[0], values[2], atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), values, atol=1e-6)
    status, out, _ = run("embed", picture, picture)
    assert status == 0
    assert out.splitlines()[1].split() == ["waves.png", "1.000", "1.000"]


def test_words_are_embedded_beside_files_and_alone(run: Run, picture: Path, tmp_path: Path) -> None:
    status, out, _ = run("embed", picture, "--text", "a bird", "--text", "a castle", "--json", "-o", tmp_path / "e.npy")
    assert status == 0
    rows = json.loads(out)["items"]
    assert [set(row) for row in rows] == [{"file", "tokens", "embedding"}, *[{"text", "embedding"}] * 2]
    assert [row["text"] for row in rows[1:]] == ["a bird", "a castle"]
    expected = Tokenizer.load("tiny-continuous", device="cpu").embed_texts(["a bird", "a castle"])
    np.testing.assert_allclose(np.load(tmp_path / "e.npy")[1:], expected, atol=1e-6)
    status, out, _ = run("embed", "--text", "a bird", "--text", "The bird!")
    assert status == 0
    assert out.splitlines()[0].endswith("similarity to the texts in this order:")
    assert out.splitlines()[1].split() == ["a", "bird", "1.000", "1.000"]
    status, _, err = run("embed", picture, "--text", "xyzzy")
    assert (status, "atoken: --text: 'xyzzy': no word of it is known" in err) == (1, True), err
    status, _, err = run("embed")
    assert (status, "give files, --text WORDS, or both" in err) == (2, True), err
    assert run("embed", tmp_path / "missing.png")[0] == 2


def test_weights_of_ones_own_have_no_words(run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((BUNDLED / "tiny-continuous.safetensors").read_bytes())
    status, _, err = run("embed", "--text", "a bird", "--model", copy)
    assert (status, "'copy' has no text side" in err) == (1, True), err


def test_tokens_of_other_weights_need_force(run: Run, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load("tiny-continuous", device="cpu")
    [item] = tokenizer.encode([Image(pixels=waves(32, 32))])
    foreign = tmp_path / "foreign.tokens"
    foreign.write_bytes(dump_tokens([type(item)(**{**item.__dict__, "revision": "0" * 64})]))
    status, _, err = run("decode", foreign, "-o", tmp_path / "a.png")
    assert status == 1
    assert "000000000000" in err
    assert run("decode", foreign, "-o", tmp_path / "a.png", "--force")[0] == 0


def test_the_installation_verifies_itself(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("verify", "--dump", tmp_path / "dump")
    assert status == 0
    assert "0 failed" in out
    assert len(out.splitlines()) == len(list((tmp_path / "dump").iterdir())) + 2, "a line a case, and the sum"
    assert len(run("verify", "--all")[1].splitlines()) > 98
    assert run("verify", tmp_path / "nothing")[0] == 2


def test_models_and_versions_are_listed(run: Run) -> None:
    status, out, _ = run("models")
    assert status == 0
    assert out.startswith("tiny-continuous ")
    assert "tiny-discrete" in out
    cards = json.loads(run("models", "--json")[1])
    assert [card["codebooks"] for card in cards] == [0, 8]
    assert f"python {sys.version.split()[0]}" in run("version")[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"hello, this is text", "broken.png"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "broken.png"),
    ],
)
def test_a_broken_file_is_named(run: Run, picture: Path, tmp_path: Path, content: bytes, message: str) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(content)
    status, _, err = run("encode", picture, broken, "-o", tmp_path / "a.tokens")
    assert (status, len(err.strip().splitlines())) == (1, 1)
    assert err.startswith("atoken: ")
    assert message in err


@pytest.mark.parametrize("command", ["encode", "embed"])
@pytest.mark.parametrize("name", ["truncated.jpg", "damaged.mp4"])
def test_content_that_only_the_decoder_finds_damaged_is_named(
    run: Run, picture: Path, tmp_path: Path, command: str, name: str
) -> None:
    broken = tmp_path / name
    if name == "truncated.jpg":
        content = encode_image(waves(70, 101), "jpeg")
        broken.write_bytes(content[: len(content) * 2 // 3])
    else:  # the container stays whole, frames in it do not
        content = encode_video(np.stack([waves(34, 50, t) for t in range(21)]), 12.0, "mp4")
        start, stop = len(content) * 2 // 5, len(content) * 3 // 5
        broken.write_bytes(content[:start] + b"\xa5" * (stop - start) + content[stop:])
    status, _, err = run(command, picture, broken, "-o", tmp_path / "out")
    assert (status, len(err.strip().splitlines())) == (1, 1)
    assert err.startswith(f"atoken: {broken}: the ")
    assert "data is damaged or cut short" in err


def test_a_picture_too_small_to_crop_is_named(run: Run, picture: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.png"
    small.write_bytes(encode_image(waves(15, 40)))
    status, _, err = run("encode", picture, small, "-o", tmp_path / "a.tokens", "--fit", "crop")
    assert (status, f"{small}: with fit=crop" in err) == (1, True), err


def test_what_is_no_token_file_is_named(run: Run, picture: Path, clip: Path, tmp_path: Path) -> None:
    photo, text, tokens = tmp_path / "photo.jpg", tmp_path / "text.tokens", tmp_path / "cut.tokens"
    photo.write_bytes(encode_image(waves(70, 101), "jpeg"))
    text.write_text("hello, this is text")
    assert run("encode", picture, "-o", tokens)[0] == 0
    tokens.write_bytes(tokens.read_bytes()[:-40])
    for file, message in (
        (photo, f"{photo}: this is a JPEG picture, not a token file"),
        (picture, f"{picture}: this is a PNG picture, not a token file"),
        (clip, f"{clip}: this is a Matroska or WebM clip, not a token file"),
        (text, f"{text}: no token file: "),
        (tokens, f"{tokens}: "),
    ):
        status, _, err = run("decode", file, "-o", tmp_path / "a.png")
        assert (status, err.startswith(f"atoken: {message}")) == (1, True), err


@pytest.mark.parametrize("name", ["nope", "nope.safetensors", "", "so400m-continuous=nope.pt"])
@pytest.mark.parametrize("command", [("serve", "--port", 0), ("worker", "--redis", "redis://127.0.0.1:1")])
def test_a_model_that_is_not_there_stops_the_start(run: Run, command: tuple[object, ...], name: str) -> None:
    status, out, err = run(*command, "--model", "tiny-discrete", "--model", name)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"atoken: model {name!r}")
    assert "tiny-continuous, tiny-discrete" in err


def test_models_that_are_there_may_start(tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    file.touch()
    check_models(["tiny-continuous", str(file), str(tmp_path), f"so400m-continuous={file}"])


@pytest.mark.parametrize(("dtype", "is_said"), [("bfloat16", True), ("float16", True), ("float32", False)])
def test_verify_says_what_the_limits_are_for(run: Run, tmp_path: Path, dtype: str, is_said: bool) -> None:
    out = run("verify", tmp_path, "--dtype", dtype)[1]
    assert (f"float32: errors of about 1e-2 are normal in {dtype}" in out) == is_said


def test_mistakes_are_answered_with_what_is_allowed(run: Run, picture: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "a.tokens"
    for arguments, message in (
        (("encode", picture, "-o", tmp_path / "no" / "a.tokens"), "there is no folder"),
        (("encode", picture, "-o", tokens, "--model", "nope"), "tiny-continuous, tiny-discrete"),
        (("encode", picture, "-o", tokens, "--outputs", "codes"), "latents, embedding, features"),
        (("encode", picture, "-o", tokens, "--outputs", "codes"), "--model tiny-discrete has codes"),
        (("encode", picture, "-o", tokens, "--fit", "stretch"), "pad or crop"),
        (("encode", picture, "-o", tokens, "--device", "cuda:7"), "cpu"),
        (("encode", picture, "-o", tokens, "--dtype", "int8"), "bfloat16"),
        (("verify", "--dtype", "int8"), "bfloat16"),
        (("decode", picture, "-o", tmp_path / "a.png"), "token file"),
        (("worker",), "--redis URL"),
        (("worker", "--redis", "http://somewhere"), "redis://"),
        (("serve", "--redis", "somewhere"), "redis://"),
        (("serve", "--dtype", "int8"), "ATOKEN_DTYPE"),
    ):
        status, _, err = run(*arguments)
        assert (status, message in err) == (1, True), (arguments, err)
    assert run("encode", tmp_path / "missing.png", "-o", tokens)[0] == 2
    assert run("no-such-command")[0] == 2


def test_a_port_in_use_is_said_at_once(run: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, err = run("serve", "--port", port)
    assert status == 1
    assert f"127.0.0.1:{port}" in err


def test_help_comes_without_the_heavy_packages() -> None:
    code = (
        "import sys\nfrom service.cli.main import app\n"
        "heavy = {'torch', 'model', 'fastapi', 'redis', 'av', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.argv = ['atoken', '--help']\napp()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("serve", "worker", "encode", "decode", "embed", "verify", "models", "version"):
        assert f"\n  {command}" in done.stdout


def test_errors_for_people() -> None:
    missing = ModuleNotFoundError("No module named 'torch'", name="torch")
    assert explain(missing) == "this command needs the package 'torch': pip install 'atoken-serve[local]'"
    assert explain(OSError(28, "No space left on device", "a.tokens")) == "a.tokens: No space left on device"
    assert explain(ZeroDivisionError()) is None


def test_a_fault_of_ours_is_one_line_unless_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.cli import local

    def broken() -> None:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(local, "list_versions", broken)
    status, _, err = run("version")
    assert (status, len(err.splitlines())) == (1, 1)
    assert "ZeroDivisionError: bug" in err
    monkeypatch.setattr(sys, "argv", ["atoken", "--debug", "version"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize("suffix", [".ply", ".splat", ".spz", ".png", ".mp4", ".npz"])
def test_a_mesh_to_tokens_and_to_every_form_of_it(run: Run, tmp_path: Path, suffix: str) -> None:
    mesh, tokens, back = tmp_path / "arms.glb", tmp_path / "arms.tokens", tmp_path / f"back{suffix}"
    mesh.write_bytes(arms_glb())
    assert run("encode", mesh, "-o", tokens)[0] == 0
    status, out, _ = run("decode", tokens, "-o", back)
    assert status == 0
    assert "voxels" in out
    if suffix == ".ply":
        assert len(decode_ply(back.read_bytes())) % 32 == 0
    assert back.stat().st_size > 1000
