import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.multiprocessing.spawn import spawn

from model import Tokenizer
from model.config import VARIANTS
from model.network import ATokenNet, build
from tests.training.conftest import SMALL
from training.checkpoint import load_checkpoint, save_checkpoint
from training.config import RECIPES, OptimConfig, TrainConfig
from training.data import Library, training_batch
from training.loop import Limits, Trainer, learning_rate
from training.small import _check_recipe, export, main
from training.snapshots import SaveError

CONFIG = replace(RECIPES["tiny-continuous"][0], data=SMALL, steps=40, optim=OptimConfig(warmup_steps=5))


def copy_of(net: ATokenNet) -> ATokenNet:
    copy = build(net.config)
    copy.load_state_dict(net.state_dict())
    return copy


def test_the_loss_falls(net: ATokenNet, library: Library, tmp_path: Path) -> None:
    # The same batch at every step, so that a fall is the optimiser's and not the draw's.
    trainer = Trainer(CONFIG, net, library)
    losses = []
    for _ in range(12):
        losses.append(float(trainer.train_step(0.0).log_mse))
        trainer.step = 0
    assert losses[-1] < losses[0] - 0.1


def test_a_run_stopped_and_resumed_gives_the_same_losses_bit_for_bit(
    net: ATokenNet, library: Library, tmp_path: Path
) -> None:
    whole = Trainer(CONFIG, copy_of(net), library).run(tmp_path / "whole", Limits(), stop_at=6)
    Trainer(CONFIG, copy_of(net), library).run(tmp_path / "parts", Limits(), stop_at=3)

    state = load_checkpoint(tmp_path / "parts")
    assert state.step == 3
    assert state.config == CONFIG
    torch.manual_seed(99)
    second = Trainer(state.config, build(net.config), library)
    second.restore(state)
    assert second.run(tmp_path / "parts", Limits(), stop_at=6) == whole[3:]

    first, last = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "parts")
    for name, tensor in first.ema.items():
        assert torch.equal(tensor, last.ema[name]), name


def test_a_kill_between_checkpoints_loses_only_what_came_after(
    net: ATokenNet, library: Library, tmp_path: Path
) -> None:
    class KilledError(Exception):
        pass

    def log(line: str) -> None:
        if json.loads(line)["step"] == 4:
            raise KilledError

    trainer = Trainer(CONFIG, net, library)
    with pytest.raises(KilledError):
        trainer.run(tmp_path, Limits(save_every_s=0, log_every=2), log=log)
    assert load_checkpoint(tmp_path).step == 3
    assert not list(tmp_path.glob("*.partial"))


def test_sigterm_saves_and_ends_at_the_end_of_the_step(net: ATokenNet, library: Library, tmp_path: Path) -> None:
    def log(line: str) -> None:
        if json.loads(line)["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    trainer = Trainer(CONFIG, net, library)
    trainer.run(tmp_path, Limits(log_every=2), log=log)
    assert trainer.told_to_stop
    assert load_checkpoint(tmp_path).step == trainer.step == 4
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    net: ATokenNet, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, said, save = Trainer(CONFIG, net, library), list[str](), torch.save

    def full(values: object, path: Path) -> None:
        path.write_bytes(b"half of it")
        if trainer.step in (2, 4):
            raise RuntimeError("unexpected pos")  # as torch says it
        save(values, path)

    monkeypatch.setattr(torch, "save", full)
    trainer.run(tmp_path, Limits(save_every_s=0), log=said.append, stop_at=3)
    assert load_checkpoint(tmp_path).step == 3
    assert len(said) == 1
    assert re.search(r"checkpoint.pt could not be written: unexpected pos \([\d.,]+ MB free in ", said[0])
    with pytest.raises(SaveError, match="could not be written"):
        trainer.run(tmp_path, Limits(), log=said.append, stop_at=4)
    assert load_checkpoint(tmp_path).step == 3, "the last good one stays"
    assert not list(tmp_path.glob("*.partial"))


def test_time_ends_a_schedule(net: ATokenNet, library: Library, tmp_path: Path) -> None:
    trainer = Trainer(CONFIG, net, library)
    trainer.elapsed_s = 59.0
    trainer.run(tmp_path, Limits(minutes=1), log=lambda line: None)
    assert trainer.step < CONFIG.steps
    assert trainer.elapsed_s >= 60


def test_codes_train_the_decoder_alone(net: ATokenNet, library: Library) -> None:
    discrete = build(VARIANTS["tiny-discrete"])
    taken = {name: value for name, value in net.state_dict().items() if not name.startswith("linear_path")}
    state = {**discrete.state_dict(), **taken}
    discrete.load_state_dict(state)
    trainer = Trainer(
        replace(RECIPES["tiny-discrete"][0], data=SMALL, optim=OptimConfig(warmup_steps=1)), discrete, library
    )
    before = {name: tensor.clone() for name, tensor in discrete.state_dict().items()}
    trainer.train_step(0.0)
    moved = {name for name, tensor in discrete.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "decoder.out_layer.weight" in moved
    assert not any(name.startswith(("encoder", "proj", "linear_path")) for name in moved)


def test_learning_rate_warms_up_and_falls() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10, final=0.1)
    assert learning_rate(config, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(config, 10, 0.0) == pytest.approx(1.0)
    assert learning_rate(config, 50, 0.5) == pytest.approx(0.55)
    assert learning_rate(config, 99, 1.0) == pytest.approx(0.1)


@pytest.mark.parametrize("changes", [{}, {"weight_decay": 0.0}, {"edge_scale": 1.0}, {"matrix_lr": 0.0}])
def test_matrices_of_blocks_go_to_muon_and_nothing_else(
    net: ATokenNet, library: Library, changes: dict[str, float]
) -> None:
    trainer = Trainer(replace(CONFIG, optim=OptimConfig(**changes)), net, library)
    names = {id(value): name for name, value in net.named_parameters()}
    groups = [
        [{names[id(p)] for p in group["params"]} for group in part.param_groups] for part in trainer.optimizer.parts
    ]
    together = [name for part in groups for group in part for name in group]
    assert sorted(together) == sorted(name for name, value in net.named_parameters() if value.requires_grad)
    if changes.get("matrix_lr") == 0:
        assert len(groups) == 1
        return
    (matrices,) = groups[1]
    assert "encoder.blocks.0.attn.to_out.weight" in matrices
    assert all(".blocks." in name and "norm" not in name for name in matrices)
    trainer.train_step(0.0)


def test_a_checkpoint_of_an_unknown_recipe_is_named(net: ATokenNet, library: Library, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, Trainer(CONFIG, net, library).state())
    values = torch.load(path)
    values["config"]["of_old"] = True
    torch.save(values, path)
    with pytest.raises(ValueError, match=r"does not know .*of_old"):
        load_checkpoint(tmp_path)


def test_a_stage_of_another_recipe_is_not_taken_for_this_one(net: ATokenNet, tmp_path: Path) -> None:
    path = tmp_path / "image.safetensors"
    export(net, CONFIG, 7, path, torch.float32)
    _check_recipe(path, replace(CONFIG, steps=9, minutes=0.1, seed=3))
    with pytest.raises(ValueError, match=r"image.safetensors was made by another recipe \(optim differ\)"):
        _check_recipe(path, replace(CONFIG, optim=OptimConfig(lr=1.0)))


def test_what_is_exported_is_the_average_and_loads(net: ATokenNet, library: Library, tmp_path: Path) -> None:
    trainer = Trainer(CONFIG, net, library)
    trainer.train_step(0.0)
    export(trainer.ema, CONFIG, 1, tmp_path / "small.safetensors", torch.float16)
    tokenizer = Tokenizer.load(str(tmp_path / "small.safetensors"), device="cpu", dtype="float32")
    wanted = trainer.ema.linear_path.still.synthesis.half().float()
    assert torch.equal(tokenizer.net.linear_path.still.synthesis, wanted)


def test_a_config_comes_back_from_json() -> None:
    for config in (stage for stages in RECIPES.values() for stage in stages):
        assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(TypeError, match="unknown"):
        TrainConfig.from_json({**CONFIG.to_json(), "unknown": 1})


def test_the_command_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny-continuous", "--data", str(tmp_path)]) == 2
    assert "no images" in capsys.readouterr().err


def test_drawings_without_teachers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tiny-continuous", "--data", str(tmp_path), "--drawings", str(tmp_path), "--no-semantics"])
    assert "--drawings are for the embedding alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threads", "0"], "1 or more"),
        (["--steps", "-1"], "1 or more"),
        (["--seed", "-1"], "0 or more"),
        (["--minutes", "nan"], "more than 0 minutes"),
        (["--minutes", "-1"], "more than 0 minutes"),
        (["--encoder", "nobody.safetensors"], "no such file"),
    ],
)
def test_bad_options_are_refused_at_once(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tiny-continuous", *words])
    assert message in capsys.readouterr().err


def contents(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Header and tensors; the bytes of two equal files differ, since the header's order is left to chance."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_a_stage_that_was_told_to_stop_is_not_taken_for_done(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], net: ATokenNet
) -> None:
    monkeypatch.setattr("training.small.prepare", lambda *_: net)

    def stopped(self: Trainer, *_: object, **__: object) -> list[float]:
        self.told_to_stop = True
        return []

    monkeypatch.setattr(Trainer, "run", stopped)
    assert main(["tiny-continuous", "--data", str(data), "--out", str(tmp_path), "--steps", "2", "--no-semantics"]) == 0
    assert "told to stop in stage video, which is saved" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.slow
def test_the_command_goes_through_its_stages_and_on_where_it_was(data: Path, tmp_path: Path) -> None:
    given = ["tiny-continuous", "--data", str(data), "--out", str(tmp_path), "--steps", "2", "--no-semantics"]
    assert main(given) == 0
    stages = [config.stage for config in RECIPES["tiny-continuous"] if config.data.anything]
    assert not (tmp_path / "image").exists()
    assert all(load_checkpoint(tmp_path / stage).step == 2 for stage in stages)
    written = contents(tmp_path / "tiny-continuous.safetensors")
    (tmp_path / f"{stages[-1]}.safetensors").unlink()  # as if killed before it was written
    assert main(given) == 0
    again = contents(tmp_path / "tiny-continuous.safetensors")
    assert again[0] == written[0]
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in again[1].items())
    discrete = [
        *("tiny-discrete", "--data", str(data), "--out", str(tmp_path / "codes"), "--steps", "2"),
        *("--encoder", str(tmp_path / "tiny-continuous.safetensors")),
    ]
    assert main(discrete) == 0
    ours, theirs = (
        Tokenizer.load(str(path), device="cpu", dtype="float32").net.encoder.state_dict()
        for path in (tmp_path / "codes" / "tiny-discrete.safetensors", tmp_path / "tiny-continuous.safetensors")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _one_of_two(rank: int, store: str, start: dict[str, torch.Tensor], library: Library, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    net = build(VARIANTS["tiny-continuous"])
    # The second process starts elsewhere: the first one's weights must reach it.
    net.load_state_dict(start if rank == 0 else {name: value + 1 for name, value in start.items()})
    trainer = Trainer(CONFIG, net, library)
    trainer.train_step(0.0)
    torch.save(trainer.net.state_dict(), f"{out}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_take_the_mean_of_their_gradients(net: ATokenNet, library: Library, tmp_path: Path) -> None:
    start = net.state_dict()
    spawn(_one_of_two, (str(tmp_path / "store"), start, library, str(tmp_path / "after")), nprocs=2)
    first, second = (torch.load(tmp_path / f"after-{rank}.pt") for rank in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name

    # One process that sees both batches: the mean of two losses has the mean of their gradients.
    trainer = Trainer(CONFIG, copy_of(net), library)
    gradients: dict[str, torch.Tensor] = {}
    for number in range(2):
        alone = Trainer(CONFIG, copy_of(net), library)
        batch = training_batch(CONFIG.seed, number, library, CONFIG.data, net.config)
        alone.losses(batch, torch.Generator().manual_seed(CONFIG.seed * 1_000_003 + number)).total.backward()
        for name, parameter in alone.net.named_parameters():
            if parameter.grad is not None:
                gradients[name] = gradients.get(name, torch.zeros(())) + parameter.grad / 2
    for name, parameter in trainer.net.named_parameters():
        parameter.grad = gradients.get(name)
    torch.nn.utils.clip_grad_norm_(trainer.net.parameters(), CONFIG.optim.clip)
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["scale"] * learning_rate(CONFIG.optim, 0, 0.0)
    trainer.optimizer.step()
    for name, value in trainer.net.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=2e-5, msg=name)
