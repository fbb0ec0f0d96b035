"""Each term of a step against a loop in plain torch, and that a step uses them as it should."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from media.types import Image, Item, Video, Voxels
from tests.training.tiny_run import WIDTH, recipe, trainer
from training.batches import Kind, Sample, pack_samples
from training.curriculum import StageTrainer
from training.fresh import fresh
from training.generated import hash_tokens
from training.losses import kl_rows
from training.objective import (
    Pictures,
    Texts,
    distillation_term,
    perceptual_terms,
    pictures_of,
    reconstruction_terms,
    sigmoid_term,
    square,
    total,
    weight_of,
)
from training.ranks import Ranks, joined
from training.stages import Recipe, Task, Weights
from training.student import Outputs, Student
from training.teachers import Teachers, random_teachers

PLAN = recipe()
MODEL = PLAN.model(PLAN.stage("image"))
COUNT = 5
"""Samples of the whole step, of which a pass holds fewer."""

DISTINCT = Weights(
    reconstruction=0.3,
    semantic=0.7,
    kl=0.011,
    l1=2.0,
    lpips=3.0,
    gram=5.0,
    clip=7.0,
    adversarial=11.0,
    temperature=1.5,
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as one:
        yield one


@pytest.fixture(scope="module")
def teachers() -> Teachers:
    return random_teachers(WIDTH, seed=0)


@pytest.fixture(scope="module")
def teachers64() -> Teachers:
    made = random_teachers(WIDTH, seed=0)
    for net in (made.vgg, made.lpips, made.clip, made.vision, made.text):
        cast(nn.Module, net).double()
    for layer in made.vgg.features:
        if isinstance(layer, nn.Conv2d):
            layer.weight *= 6**0.5  # so that the deepest maps are no fainter than the first
    return made


def image(height: int, width: int, seed: int) -> Image:
    return Image(pixels=np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


TWO = [Sample(image(32, 48, 0), "a red disc"), Sample(image(64, 32, 1), "a blue ring")]
"""6 and 8 tokens."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def patches_of(item: Item) -> list[list[float]]:
    """Values in -1..1 of every token in raster order: of the first frame of stills and voxels, of all four of clips."""
    if isinstance(item, Voxels):
        return [[2 * float(value) - 1 for value in row] for row in item.feats]
    frames = item.frames if isinstance(item, Video) else item.pixels[None]
    depth = 4 if isinstance(item, Video) else 1
    rows = []
    for t in range(0, len(frames), depth):
        for y in range(0, frames.shape[1], 16):
            for x in range(0, frames.shape[2], 16):
                values = frames[t : t + depth, y : y + 16, x : x + 16].reshape(-1)
                rows.append([float(value) / 127.5 - 1 for value in values])
    return rows


def picture_of(rows: Tensor, height: int, width: int) -> Tensor:
    """[1, 3, H, W] of the patches of one image."""
    picture = rows.new_zeros(1, 3, height, width)
    tokens = iter(rows)
    for y in range(0, height, 16):
        for x in range(0, width, 16):
            picture[0, :, y : y + 16, x : x + 16] = next(tokens)[:768].reshape(16, 16, 3).permute(2, 0, 1)
    return picture


def at_224(picture: Tensor) -> Tensor:
    return F.interpolate(picture, (224, 224), mode="bilinear", antialias=True)


def pixels_of(item: Item) -> Tensor:
    assert isinstance(item, Image)
    return torch.from_numpy(item.pixels).permute(2, 0, 1)[None].double() / 127.5 - 1


# Terms


def test_l1_against_a_loop() -> None:
    """Of images, a clip and voxels: each counts alike, and of stills what is not seen does not count."""
    clip = Video(frames=np.random.default_rng(2).integers(0, 256, (8, 32, 16, 3), dtype=np.uint8))
    feats = np.random.default_rng(3).random((3, 768), dtype=np.float32)
    voxels = Voxels(coords=np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.int32), feats=feats)
    samples = [*TWO, Sample(clip), Sample(voxels)]
    micro = pack_samples(samples, range(4), MODEL)
    decoded = noise(len(micro.packed), 3072)
    found = reconstruction_terms(Outputs(decoded, None, None), micro, micro.packed.feats, MODEL, COUNT)
    assert found.keys() == {"l1"}
    wanted, row = 0.0, 0
    for sample in samples:
        errors = []
        for patch in patches_of(sample.item):
            errors += [abs(float(decoded[row, place]) - value) for place, value in enumerate(patch)]
            row += 1
        wanted += sum(errors) / len(errors)
    assert row == len(decoded)
    assert float(found["l1"]) == pytest.approx(wanted / COUNT, rel=1e-6)


def test_l1_of_stills_alone() -> None:
    """Then the network gives the values of one frame only."""
    micro = pack_samples(TWO, [0, 1], MODEL)
    decoded = noise(14, 768)
    found = reconstruction_terms(Outputs(decoded, None, None), micro, micro.packed.feats[:, :768], MODEL, COUNT)
    wanted = sum(
        float((rows - torch.tensor(patches_of(sample.item), dtype=torch.float64)).abs().mean())
        for sample, rows in zip(TWO, (decoded[:6], decoded[6:]), strict=True)
    )
    assert float(found["l1"]) == pytest.approx(wanted / COUNT, rel=1e-6)


def test_kl_is_the_share_of_the_items() -> None:
    micro = pack_samples(TWO, [0, 1], MODEL)
    outputs = Outputs(noise(14, 768), torch.tensor([3.0, 4.5]), None)
    found = reconstruction_terms(outputs, micro, micro.packed.feats, MODEL, COUNT)
    assert float(found["kl"]) == pytest.approx(7.5 / COUNT)


def test_pictures_are_the_images_at_224() -> None:
    micro = pack_samples(TWO, [0, 1], MODEL)
    decoded = noise(14, 768)
    pictures = pictures_of(Outputs(decoded, None, None), micro.packed, micro.packed.feats, MODEL)
    given = torch.cat([at_224(pixels_of(sample.item)) for sample in TWO])
    seen = torch.cat([at_224(picture_of(decoded[:6], 32, 48)), at_224(picture_of(decoded[6:], 64, 32))])
    torch.testing.assert_close(pictures.given.double(), given, atol=1e-5, rtol=0)
    torch.testing.assert_close(pictures.seen, seen)


def test_perceptual_terms_against_loops(teachers64: Teachers) -> None:
    given, seen = (at_224(0.3 * noise(2, 3, 56, 40, seed=seed)) for seed in (1, 2))
    found = perceptual_terms(Pictures(given=given, seen=seen), teachers64, DISTINCT, COUNT)
    lpips = gram = clip = 0.0
    for one, other in zip(given, seen, strict=True):
        pairs = list(zip(teachers64.vgg(one[None]), teachers64.vgg(other[None]), strict=True))
        assert len(pairs) == 5
        for index, (a, b) in enumerate(pairs):
            a, b = a[0].flatten(1), b[0].flatten(1)  # [C, H W]
            head = teachers64.lpips.heads()[index]
            apart = (a / a.norm(dim=0).clamp(min=1e-9) - b / b.norm(dim=0).clamp(min=1e-9)).square()
            lpips += float((apart * head[:, None]).sum(0).mean())
            if index < 4:  # relu5_3 is not one of Gram's
                gram += float(((a @ a.T - b @ b.T) / a.numel()).square().mean())
        x, y = teachers64.clip(one[None])[0], teachers64.clip(other[None])[0]
        clip += 1 - float(x @ y / x.norm() / y.norm())
    assert float(found["lpips"]) == pytest.approx(lpips / COUNT, rel=1e-5)
    assert float(found["gram"]) == pytest.approx(gram / COUNT, rel=1e-6)
    assert float(found["clip"]) == pytest.approx(clip / COUNT, rel=1e-6)


def test_perceptual_terms_of_weight_0_are_left_out(teachers: Teachers) -> None:
    pictures = Pictures(given=noise(1, 3, 224, 224).float(), seen=noise(1, 3, 224, 224, seed=1).float())
    for name in ("lpips", "gram", "clip"):
        found = perceptual_terms(pictures, teachers, replace(DISTINCT, **{name: 0.0}), COUNT)
        assert found.keys() == {"lpips", "gram", "clip"} - {name}


def texts_of(samples: list[Sample], teachers: Teachers) -> Texts:
    ids = hash_tokens([sample.caption for sample in samples])
    return Texts(embeddings=teachers.text(ids), ids=ids)


def distillation(pictures: Tensor, students: Tensor, texts: Tensor, teachers: Teachers, tau: float) -> float:
    """Sum over images of KL(softmax(teacher / tau) || softmax(student / tau)) over the texts. Pictures at 224."""
    found = 0.0
    for picture, student in zip(pictures, students, strict=True):
        teacher = teachers.vision(picture[None].float())[0].double()
        probabilities = []
        for row in (teacher, student.double()):
            cosines = [float(row @ text.double() / row.norm() / text.double().norm()) for text in texts]
            weights = [math.exp(math.exp(4.8438) * (cosine - max(cosines)) / tau) for cosine in cosines]
            probabilities.append([weight / sum(weights) for weight in weights])
        found += sum(p * math.log(p / q) for p, q in zip(*probabilities, strict=True) if p > 0)
    return found


def test_distillation_against_a_loop(teachers: Teachers) -> None:
    """Over the texts of the whole step, not only those of the pass."""
    texts = texts_of([*TWO, Sample(TWO[0].item, "a white square"), Sample(TWO[0].item, "a green rod")], teachers)
    micro = pack_samples(TWO, [0, 1], MODEL)
    students = noise(2, WIDTH).float()
    for tau in (2.0, 1.0):
        found = distillation_term(students, micro, texts, teachers, tau, COUNT)
        pictures = torch.cat([at_224(pixels_of(sample.item)) for sample in TWO])
        wanted = distillation(pictures, students, texts.embeddings, teachers, tau)
        assert wanted > 0.1
        assert float(found["distill"]) == pytest.approx(wanted / COUNT, rel=1e-3)


def test_teachers_see_squares_of_224() -> None:
    for sample in TWO:
        found = square(sample.item)
        assert found.shape == (1, 3, 224, 224)
        torch.testing.assert_close(found.double(), at_224(pixels_of(sample.item)), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="a video; only images are distilled"):
        square(Video(frames=np.zeros((4, 16, 16, 3), np.uint8)))


def sigmoid(rows: Tensor, own: list[str], captions: list[str], texts: Tensor) -> float:
    """Sum over items and captions of -log sigmoid(+-logit): + for equal captions."""
    found = 0.0
    for row, mine in zip(rows.double(), own, strict=True):
        for text, caption in zip(texts.double(), captions, strict=True):
            logit = math.exp(4.8438) * float(row @ text / row.norm() / text.norm()) - 15.5625
            found += math.log1p(math.exp(-logit if mine == caption else logit))
    return found


def test_sigmoid_against_a_loop(teachers64: Teachers) -> None:
    captions = ["a red ball", "a blue box", "a red ball", "a rod"]
    ids = hash_tokens(captions)
    texts = Texts(embeddings=teachers64.text(ids), ids=ids)
    rows = noise(2, WIDTH)
    found = sigmoid_term(rows, [2, 1], texts, COUNT)
    wanted = sigmoid(rows, ["a red ball", "a blue box"], captions, texts.embeddings)
    assert float(found["sigmoid"]) == pytest.approx(wanted / COUNT, rel=1e-6)


# The total


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("l1", 0.3 * 2),
        ("lpips", 0.3 * 3),
        ("gram", 0.3 * 5),
        ("clip", 0.3 * 7),
        ("adversarial", 0.3 * 11),
        ("kl", 0.011),
        ("distill", 0.7),
        ("sigmoid", 0.7),
    ],
)
def test_weights_of_the_terms(name: str, weight: float) -> None:
    assert weight_of(name, DISTINCT) == pytest.approx(weight, rel=1e-12)
    terms = {name: torch.tensor(2.0), "kl": torch.tensor(10.0)}
    wanted = 10 * 0.011 if name == "kl" else 2 * weight + 10 * 0.011
    assert float(total(terms, DISTINCT)) == pytest.approx(wanted, rel=1e-6)


def test_published_weights_of_the_terms() -> None:
    wanted = {"l1": 0.2, "lpips": 2.0, "gram": 200.0, "clip": 0.2, "kl": 1e-8, "distill": 1.0, "sigmoid": 1.0}
    assert {name: weight_of(name, Weights()) for name in wanted} == pytest.approx(wanted, rel=1e-12)


# Gradients


def test_gradients_of_l1_and_kl_in_float64() -> None:
    micro = pack_samples(TWO, [0, 1], MODEL)

    def l1(decoded: Tensor) -> Tensor:
        return reconstruction_terms(Outputs(decoded, None, None), micro, micro.packed.feats, MODEL, COUNT)["l1"]

    assert torch.autograd.gradcheck(l1, (noise(14, 768).requires_grad_(),), fast_mode=True)
    mean, logvar = noise(3, 4, seed=3).requires_grad_(), noise(3, 4, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(kl_rows, (mean, logvar))


def test_only_what_is_seen_gets_gradients(teachers: Teachers) -> None:
    given, seen = (noise(1, 3, 224, 224, seed=seed).float().requires_grad_() for seed in (0, 1))
    total(perceptual_terms(Pictures(given=given, seen=seen), teachers, DISTINCT, 1), DISTINCT).backward()
    assert given.grad is None
    assert seen.grad is not None
    assert seen.grad.abs().max() > 0


# The network in training


def test_the_student_decodes_a_draw_of_the_posterior() -> None:
    net = fresh(MODEL, 0)
    micro = pack_samples(TWO, [0, 1], MODEL)
    drawn = noise(14, MODEL.latent_channels).float()
    with torch.no_grad():
        net.proj.weight[MODEL.latent_channels :] += 0.3  # log variances that are not near 0
        outputs = Student(net)(micro.packed, micro.items, drawn, decode=True, embed=False)
        mean, logvar = net.posterior(net.encode(micro.packed), micro.packed)
        latents = mean + logvar.exp().sqrt() * drawn
        wanted = net.decode(micro.packed.with_feats(latents), 768)
        plain = net.decode(micro.packed.with_feats(mean), 768)
    torch.testing.assert_close(outputs.decoded, wanted)
    assert (outputs.decoded - plain).abs().mean() > 0.01
    variance = logvar.double().exp()
    rows = [
        sum(
            0.5 * (float(mean[n, k]) ** 2 + float(variance[n, k]) - 1 - math.log(float(variance[n, k])))
            for k in range(MODEL.latent_channels)
        )
        for n in range(14)
    ]
    assert outputs.kl.tolist() == pytest.approx([sum(rows[:6]) / 6, sum(rows[6:]) / 8], rel=1e-4)


# A whole step

Pass = tuple[Any, Any, Tensor | None, Outputs]
"""Tokens, item starts, noise, and what the network gave."""


def watched(run: StageTrainer) -> list[Pass]:
    """All that goes through the network from now on."""
    passes: list[Pass] = []

    def note(_: nn.Module, given: tuple[Any, ...], outputs: Outputs) -> None:
        passes.append((*given, outputs))

    run.student.register_forward_hook(note)
    return passes


def planned(**changes: Any) -> Recipe:
    return replace(recipe(tokens=6), weights=replace(DISTINCT, adversarial=0.0), **changes)


def step_of(run: StageTrainer, step: int, drawn: dict[str, int]) -> tuple[dict[str, float], list[Pass]]:
    """One step as the `step`-th, after so many samples of each kind."""
    run.progress.step, run.progress.drawn = step, dict(drawn)
    passes = watched(run)
    return run.train_step(), passes


def samples_of(run: StageTrainer, kind: Kind, first: int, count: int) -> list[Sample]:
    return run.source.draw(kind, range(first, first + count))


def embeddings_of(passes: list[Pass]) -> Tensor:
    return torch.cat([outputs.embeddings.detach() for *_, outputs in passes if outputs.embeddings is not None])


def check_distillation(run: StageTrainer, found: dict[str, float], rows: Tensor, first: int) -> None:
    samples = samples_of(run, "distill", first, 4)
    texts = run.teachers.text(hash_tokens([sample.caption for sample in samples]))
    pictures = torch.cat([at_224(pixels_of(sample.item)) for sample in samples])
    wanted = distillation(pictures, rows, texts, run.teachers, 1.5) / 4
    assert found["distill"] == pytest.approx(wanted, rel=1e-3)


def test_a_step_of_images_by_hand(ranks: Ranks) -> None:
    """Its terms from what the network gave, over several passes; the loss is the weighted sum."""
    run = trainer(planned(), "image", ranks)
    found, passes = step_of(run, 0, {"distill": 8, "image_rec": 3})
    samples = samples_of(run, "image_rec", 3, 4)
    assert len(passes) > 2
    embedded = embeddings_of(passes)
    assert len(embedded) == 4
    check_distillation(run, found, embedded, 8)
    sums = dict.fromkeys(("l1", "lpips", "gram", "clip", "kl"), 0.0)
    left = iter(samples)
    for _, items, drawn, outputs in passes:
        if outputs.decoded is None:
            assert drawn is None
            continue
        assert outputs.kl is not None
        sums["kl"] += float(outputs.kl.detach().sum()) / 4
        for start, stop in itertools.pairwise(items):
            item = next(left).item
            assert isinstance(item, Image)
            given = pixels_of(item)
            seen = picture_of(outputs.decoded.detach()[start:stop].double(), *given.shape[2:])
            sums["l1"] += float((seen - given).abs().mean()) / 4
            a, b = (at_224(picture).float() for picture in (given, seen))
            sums["lpips"] += float(run.teachers.lpips(run.teachers.vgg, b, a)) / 4
            for one, other in list(zip(run.teachers.vgg(a), run.teachers.vgg(b), strict=True))[:4]:
                grams = [maps[0].flatten(1) @ maps[0].flatten(1).T / maps.numel() for maps in (one, other)]
                sums["gram"] += float((grams[0] - grams[1]).square().mean()) / 4
            sums["clip"] += (1 - float(F.cosine_similarity(run.teachers.clip(a), run.teachers.clip(b)))) / 4
    assert next(left, None) is None
    for name, value in sums.items():
        assert found[f"image_rec/{name}"] == pytest.approx(value, rel=1e-3, abs=1e-7), name
    parts = 2 * sums["l1"] + 3 * sums["lpips"] + 5 * sums["gram"] + 7 * sums["clip"]
    assert found["loss"] == pytest.approx(0.7 * found["distill"] + 0.3 * parts + 0.011 * sums["kl"], rel=1e-3)


@pytest.mark.parametrize(
    ("stage", "kind", "step"), [("video", "video_sem", 3), ("asset", "video_sem", 4), ("asset", "asset_sem", 7)]
)
def test_a_step_of_captions_by_hand(stage: str, kind: Kind, step: int, ranks: Ranks) -> None:
    """Each clip and asset has its own caption, in whatever pass it goes."""
    run = trainer(planned(), stage, ranks)
    found, passes = step_of(run, step, {"distill": 4, kind: 6})
    rows = embeddings_of(passes)
    assert len(passes) > 3
    assert len(rows) == 8
    check_distillation(run, found, rows[:4], 4)
    captions = [sample.caption for sample in samples_of(run, kind, 6, 4)]
    assert len(set(captions)) > 1
    wanted = sigmoid(rows[4:], captions, captions, run.teachers.text(hash_tokens(captions))) / 4
    assert found[f"{kind}/sigmoid"] == pytest.approx(wanted, rel=1e-4)
    assert found["loss"] == pytest.approx(0.7 * (found["distill"] + wanted), rel=1e-4)


def noise_of(passes: list[Pass]) -> list[Tensor]:
    """Of each item."""
    return [
        drawn[start:stop]
        for _, items, drawn, _ in passes
        if drawn is not None
        for start, stop in itertools.pairwise(items)
    ]


@pytest.mark.parametrize("kind", ["image_rec", "video_rec", "asset_rec"])
def test_every_sample_is_decoded_from_noise_of_its_own(kind: Task, ranks: Ranks) -> None:
    stage = replace(planned().stage("asset"), cycle=(kind,), distill=0, batch={kind: 16})
    plan = replace(planned(), stages=(stage,), weights=Weights(lpips=0.0, gram=0.0, clip=0.0))
    run = trainer(plan, "asset", ranks)
    _, passes = step_of(run, 0, {kind: 2})
    drawn = noise_of(passes)
    assert len(drawn) == 16
    values = torch.cat(drawn)
    assert values.shape[1] == 48
    assert float(values.mean()) == pytest.approx(0, abs=0.1)
    assert float(values.std()) == pytest.approx(1, abs=0.1)
    assert len({tuple(rows[0].tolist()) for rows in drawn}) == 16
    later = noise_of(step_of(trainer(plan, "asset", ranks), 0, {kind: 3})[1])
    assert torch.equal(later[0], drawn[1])  # of sample 3, whoever its neighbours are


def test_codes_need_no_noise(ranks: Ranks) -> None:
    run = trainer(planned(), "fsq", ranks)
    found, passes = step_of(run, 0, {})
    assert all(drawn is None for _, _, drawn, _ in passes)
    assert "video_rec/kl" not in found
