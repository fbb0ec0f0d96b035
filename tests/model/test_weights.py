"""Weights files: strict, named errors, memory near one copy, straight to the dtype."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import VARIANTS, Tokenizer, UnsupportedError, WeightsError, weights
from model.network import ATokenNet, build
from tests.model.samples import random_image, small_config
from tests.paths import CONFORMANCE, ROOT, needs_conformance


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    weights.save(build(small_config()), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


@needs_conformance
@pytest.mark.parametrize(
    ("variant", "keys"),
    [
        ("so400m-continuous", "keys_soc.txt"),
        ("so400m-stage1", "keys_soc_s1.txt"),
        ("so400m-discrete", "keys_sod.txt"),
    ],
)
def test_published_names_and_shapes(variant: str, keys: str) -> None:
    with torch.device("meta"):
        net = ATokenNet(VARIANTS[variant])
    ours = {name: "x".join(map(str, tensor.shape)) for name, tensor in net.state_dict().items()}
    rows = [line.split("\t") for line in (CONFORMANCE / keys).read_text().splitlines() if line.strip()]
    assert ours == {name: shape for name, shape, _ in rows}
    assert len(ours) == 563


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_safetensors_round_trip(saved: Path, dtype: torch.dtype) -> None:
    state, net = load_file(saved), weights.load(saved, dtype=dtype)
    assert net.config == small_config()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name].to(dtype))


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_pt_round_trip(saved: Path, tmp_path: Path, wrap: str | None) -> None:
    state = load_file(saved)
    torch.save(state if wrap is None else {wrap: state}, tmp_path / "small.pt")
    net = weights.load(tmp_path / "small.pt", small_config(), dtype=torch.bfloat16)
    assert all(torch.equal(tensor, state[name].bfloat16()) for name, tensor in net.state_dict().items())


def test_loaded_by_path_folder_and_name(saved: Path) -> None:
    for given in (saved, saved.parent):
        tokenizer = Tokenizer.load(str(given), device="cpu")
        assert tokenizer.name == "small"
        assert len(tokenizer.revision) == 64
    with pytest.raises(UnsupportedError, match="no bundled model"):
        Tokenizer.load("nothing-of-that-name")
    with pytest.raises(UnsupportedError, match="so400m-continuous"):
        Tokenizer.load(f"so500m={saved}")
    with pytest.raises(UnsupportedError, match="so400m-discrete=FILE"):
        Tokenizer.load("so400m-discrete")
    with pytest.raises(WeightsError, match="no such file"):
        Tokenizer.load("so400m-discrete=absent.pt")
    with pytest.raises(UnsupportedError, match="cpu, cuda"):
        Tokenizer.load(str(saved), device="banana")
    with pytest.raises(UnsupportedError, match="float32"):
        Tokenizer.load(str(saved), dtype="int8")


def test_errors_name_what_is_wrong(saved: Path, tmp_path: Path) -> None:
    state = load_file(saved)
    config = small_config()

    def refused(match: str, changed: dict[str, torch.Tensor]) -> None:
        for suffix in (".safetensors", ".pt"):
            path = tmp_path / f"changed{suffix}"
            save_file(changed, path) if suffix == ".safetensors" else torch.save(changed, path)
            with pytest.raises(WeightsError, match=match):
                weights.load(path, config)

    refused("missing.*proj.weight", {name: tensor for name, tensor in state.items() if name != "proj.weight"})
    refused("unknown.*surplus", {**state, "surplus": torch.zeros(1)})
    refused(r"proj.weight has shape \[3, 72\]", {**state, "proj.weight": torch.zeros(3, 72)})
    for suffix in (".safetensors", ".pt"):
        cut = tmp_path / f"cut{suffix}"
        whole = saved if suffix == ".safetensors" else tmp_path / "changed.pt"
        cut.write_bytes(whole.read_bytes()[:-5000])
        with pytest.raises(WeightsError, match=f"cut{suffix}: not a whole"):
            weights.load(cut, config)
    with pytest.raises(WeightsError, match="no such file"):
        weights.load(tmp_path / "absent.safetensors", config)
    with pytest.raises(WeightsError, match="does not say which variant"):
        weights.load(tmp_path / "changed.pt")


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "ran"),))  # type: ignore[return-value]

    torch.save({"proj.weight": Attack()}, tmp_path / "attack.pt")
    with pytest.raises(WeightsError, match=r"attack\.pt"):
        weights.load(tmp_path / "attack.pt", small_config())
    assert not (tmp_path / "ran").exists()


FULL_SIZE = """
import resource, sys, time
from pathlib import Path
import numpy as np, torch
from media.types import Image
from model import VARIANTS, Tokenizer, weights
from model.network import ATokenNet

torch.set_num_threads(2)
what, path, dtype = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
if what == "save":
    with torch.device("meta"):
        net = ATokenNet(VARIANTS["so400m-continuous"])
    net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        if "norm" in name or "gamma" in name:
            parameter.data.fill_(1.0)
        else:
            parameter.data.uniform_(-0.03, 0.03, generator=generator)
    if path.suffix == ".pt":
        torch.save(net.state_dict(), path)
    else:
        weights.save(net, path)
else:
    before = peak()
    net = weights.load(path, VARIANTS["so400m-continuous"], dtype=getattr(torch, dtype))
    loaded = peak() - before
    tokenizer = Tokenizer(net, name="full", revision="0" * 64)
    image = Image(pixels=np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8))
    tokens = tokenizer.encode([image], {"latents", "embedding"})[0]
    assert tokens.latents.shape == (12, 48) and np.isfinite(tokens.latents).all() and tokens.embedding.shape == (1152,)
    assert tokenizer.decode([tokens])[0].pixels.shape == (40, 64, 3)
    print(loaded / path.stat().st_size)
"""


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        (".safetensors", "float32"),
        pytest.param(".safetensors", "bfloat16", marks=pytest.mark.slow),
        (".pt", "bfloat16"),
    ],
)
def test_full_size_is_built_saved_loaded_and_run(tmp_path: Path, suffix: str, dtype: str) -> None:
    path = tmp_path / f"full{suffix}"

    def run(what: str) -> str:
        command = [sys.executable, "-c", FULL_SIZE, what, str(path), dtype]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    try:
        run("save")
        assert path.stat().st_size > 845_738_048 * 4
        assert float(run("load")) < 1.3  # peak host memory of the load, in sizes of the file
    finally:
        path.unlink(missing_ok=True)


def test_an_image_runs_in_every_dtype(saved: Path) -> None:
    import numpy as np

    image = random_image(np.random.default_rng(0), 32, 32)
    exact = Tokenizer.load(str(saved), device="cpu", dtype="float32").encode([image])[0].latents
    for dtype in ("bfloat16", "float16"):
        latents = Tokenizer.load(str(saved), device="cpu", dtype=dtype).encode([image])[0].latents
        assert np.abs(latents - exact).max() < 0.1 * np.abs(exact).max()
