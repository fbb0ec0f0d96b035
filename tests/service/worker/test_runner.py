"""The runner on a real network: what comes out is what the model gives for each item alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from media import wire
from media.tokens import layout_from_json, layout_to_json
from media.types import Image, Tokens, Video, Voxels
from model import Tokenizer
from model.words import WordTable
from service.queue.estimate import Rates, effort_of
from service.queue.jobs import Job, Op
from service.worker.budget import FLOOR_TOKENS, Budget
from service.worker.payloads import Output
from service.worker.runner import DeviceLostError, Failure, Result, Runner
from service.worker.selftest import pattern
from service.worker.speed import Speed

POOL = "m@1"


def job(op: Op, name: str = "j", **options: Any) -> Job:
    return Job(id=name, op=op, pool=POOL, cost=4, deadline=2e9, options=options)


def picture(height: int = 40, width: int = 56, frame: int = 0) -> Image:
    return Image(pixels=pattern(height, width, frame), notes=("first of 2 frames",))


def clip(frames: int = 5) -> Video:
    return Video(frames=np.stack([pattern(24, 40, t) for t in range(frames)]), fps=12.5)


def voxels() -> Voxels:
    values = np.random.default_rng(3).random((9, 768), np.float32)
    cells = np.stack(np.unravel_index(np.arange(9) * 7, (4, 4, 4)), axis=1).astype(np.int32)
    return Voxels(coords=cells, feats=values)


def item_payload(item: Image | Video | Voxels) -> bytes:
    if isinstance(item, Voxels):
        return wire.dumps({"coords": item.coords, "feats": item.feats}, {"kind": "voxels", "fps": None, "notes": []})
    pixels = item.pixels[None] if isinstance(item, Image) else item.frames
    fps = item.fps if isinstance(item, Video) else None
    return wire.dumps({"pixels": pixels}, {"kind": item.kind, "fps": fps, "notes": list(item.notes)})


def tokens_payload(tokens: Tokens) -> bytes:
    arrays: dict[str, Any] = {"coords": tokens.coords}
    for name in ("latents", "codes"):
        if getattr(tokens, name) is not None:
            arrays[name] = getattr(tokens, name)
    return wire.dumps(
        arrays, {"layout": layout_to_json(tokens.layout), "model": tokens.model, "revision": tokens.revision}
    )


def run(tokenizer: Tokenizer, jobs: Sequence[Job], payloads: Sequence[bytes], budget: int = 4096) -> list[Result]:
    return Runner({POOL: tokenizer}, Budget(budget), Speed(1)).run(POOL, jobs, payloads)


def good(result: Result) -> Output:
    assert isinstance(result, Output), result
    return result


class Broken:
    """A tokenizer that calls `fail` before it encodes or decodes."""

    def __init__(self, tokenizer: Tokenizer, fail: Callable[[Sequence[Any]], None]) -> None:
        self._tokenizer = tokenizer
        self._fail = fail
        self.calls: list[tuple[int, int]] = []
        self.pass_tokens = tokenizer.pass_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, items: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        self.calls.append((len(items), self.pass_tokens))
        self._fail(items)
        return self._tokenizer.encode(items, *args, **kwargs)

    def decode(self, items: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        self.calls.append((len(items), self.pass_tokens))
        self._fail(items)
        return self._tokenizer.decode(items, *args, **kwargs)


def test_a_mixed_batch_gives_each_job_what_it_asked_for(continuous: Tokenizer) -> None:
    ready = continuous.encode([clip(7)])[0]
    jobs = [
        job("encode", "latents", outputs=["latents"]),
        job("embed", "embedding", outputs=["embedding"]),
        job("decode", "decode"),
        job("encode", "back", outputs=["reconstruction", "features"]),
        job("encode", "voxels", outputs=["latents", "embedding"]),
    ]
    payloads = [
        item_payload(clip()),
        item_payload(picture()),
        tokens_payload(ready),
        item_payload(picture(17, 33)),
        item_payload(voxels()),
    ]
    latents, embedding, decoded, back, solid = map(good, run(continuous, jobs, payloads))
    alone = continuous.encode([clip()], {"latents"})[0]
    assert set(latents.arrays) == {"coords", "latents"}
    assert alone.latents is not None
    np.testing.assert_allclose(latents.arrays["latents"], alone.latents, rtol=1e-4, atol=1e-5)
    assert latents.meta["revision"] == continuous.revision
    layout = layout_from_json(latents.meta["layout"])
    assert (layout.frames, layout.height, layout.width, layout.fps) == (5, 24, 40, 12.5)

    assert set(embedding.arrays) == {"coords", "embedding"}
    np.testing.assert_allclose(embedding.arrays["embedding"], continuous.embed([picture()])[0], atol=1e-5)
    assert embedding.meta["notes"] == ["first of 2 frames"]

    assert decoded.arrays["pixels"].shape == (7, 24, 40, 3)
    assert decoded.meta == {"kind": "video", "fps": 12.5}
    expected = continuous.decode([ready])[0]
    assert isinstance(expected, Video)
    assert np.abs(decoded.arrays["pixels"].astype(int) - expected.frames.astype(int)).max() <= 1

    assert set(back.arrays) == {"coords", "features", "reconstruction.pixels"}
    assert back.arrays["reconstruction.pixels"].shape == (1, 17, 33, 3)
    assert solid.arrays["latents"].shape == (9, 48)
    assert solid.arrays["embedding"].shape == (144,)


def test_one_encode_and_one_decode_serve_the_whole_batch(continuous: Tokenizer) -> None:
    counting = Broken(continuous, lambda items: None)
    ready = continuous.encode([picture()])[0]
    jobs = [job("encode"), job("embed"), job("encode", outputs=["reconstruction"]), job("decode")]
    payloads = [item_payload(picture()), item_payload(clip()), item_payload(picture()), tokens_payload(ready)]
    for result in run(counting, jobs, payloads):  # type: ignore[arg-type]
        good(result)
    assert [count for count, _ in counting.calls] == [3, 2]


def test_a_discrete_model_gives_codes_or_latents_as_each_job_asks(discrete: Tokenizer) -> None:
    jobs = [
        job("encode", outputs=["codes", "latents"]),
        job("encode", outputs=["latents"]),
        job("embed"),
        job("encode", outputs=["reconstruction"]),
    ]
    both, latents, embedding, back = map(good, run(discrete, jobs, [item_payload(picture())] * 4))
    assert set(both.arrays) == {"coords", "codes"}
    assert set(latents.arrays) == {"coords", "latents"}
    assert set(embedding.arrays) == {"coords", "embedding"}
    assert set(back.arrays) == {"coords", "reconstruction.pixels"}
    assert both.arrays["codes"].dtype == np.int16


def test_sampling_is_reproducible_and_does_not_touch_neighbours(continuous: Tokenizer) -> None:
    jobs = [job("encode"), job("encode", sample=True, seed=5), job("encode", sample=True, seed=6)]
    mean, five, six = (good(r).arrays["latents"] for r in run(continuous, jobs, [item_payload(picture())] * 3))
    again = good(run(continuous, [jobs[1]], [item_payload(picture())])[0]).arrays["latents"]
    np.testing.assert_allclose(five, again, rtol=1e-4, atol=1e-4)
    assert np.abs(five - six).max() > 1e-2
    assert np.abs(five - mean).max() > 1e-2


def test_crop_and_pad_in_one_batch(continuous: Tokenizer) -> None:
    jobs = [job("encode", fit="crop"), job("encode", fit="pad")]
    cropped, padded = map(good, run(continuous, jobs, [item_payload(picture(40, 56))] * 2))
    assert len(cropped.arrays["coords"]) == 2 * 3
    assert len(padded.arrays["coords"]) == 3 * 4


@pytest.mark.parametrize(
    ("bad", "payload", "code"),
    [
        (job("encode", outputs=["codes"]), item_payload(picture()), "unsupported_output"),
        (job("encode", sample=True), item_payload(picture()), "invalid_parameter"),
        (job("encode", fit="crop"), item_payload(picture(8, 8)), "invalid_parameter"),
        (job("encode"), b"no payload at all", "internal"),
        (job("encode"), wire.dumps({"pixels": np.zeros((2, 2), np.uint8)}, {"kind": "image"}), "internal"),
        (job("decode"), wire.dumps({"coords": np.zeros((1, 4), np.int32)}, {}), "internal"),
    ],
)
def test_a_bad_item_fails_alone(continuous: Tokenizer, bad: Job, payload: bytes, code: str) -> None:
    jobs, payloads = [job("encode", "first"), bad, job("embed", "last")], [item_payload(picture())] * 3
    payloads[1] = payload
    first, failed, last = run(continuous, jobs, payloads)
    good(first)
    good(last)
    assert isinstance(failed, Failure)
    assert failed.code == code
    assert "Traceback" not in failed.detail


def test_tokens_that_cannot_be_decoded_fail_alone(continuous: Tokenizer) -> None:
    ready = continuous.encode([picture()])[0]
    assert ready.latents is not None
    broken = ready.latents.copy()
    broken[3, 5] = np.nan
    bad, fine = run(
        continuous,
        [job("decode", "a"), job("decode", "b")],
        [tokens_payload(replace(ready, latents=broken)), tokens_payload(ready)],
    )
    assert isinstance(bad, Failure)
    assert (bad.code, "row 3" in bad.detail) == ("invalid_token_file", True)
    assert good(fine).arrays["pixels"].shape == (1, 40, 56, 3)


def test_tokens_of_another_model_are_refused_unless_forced(continuous: Tokenizer) -> None:
    ready = continuous.encode([picture()])[0]
    foreign = tokens_payload(replace(ready, model="other", revision="f" * 64))
    refused, forced = run(continuous, [job("decode"), job("decode", force=True)], [foreign, foreign])
    assert isinstance(refused, Failure)
    assert (refused.code, "other" in refused.detail) == ("model_mismatch", True)
    good(forced)


def test_an_unexpected_fault_in_a_packed_pass_fails_only_its_cause(
    continuous: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(items: Sequence[Any]) -> None:
        if any(isinstance(item, Video) for item in items):
            raise ValueError("secret detail")

    broken = Broken(continuous, fail)
    jobs = [job("encode", "a"), job("encode", "b"), job("encode", "c")]
    a, b, c = run(broken, jobs, [item_payload(picture()), item_payload(clip()), item_payload(picture())])  # type: ignore[arg-type]
    good(a)
    good(c)
    assert isinstance(b, Failure)
    assert (b.code, "secret" in b.detail) == ("internal", False)
    assert [count for count, _ in broken.calls] == [3, 1, 1, 1]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_halves_the_budget_and_the_batch_still_comes_out(continuous: Tokenizer, error: Exception) -> None:
    limits: list[int] = []

    def fail(items: Sequence[Any]) -> None:
        if len(limits) < 2:
            limits.append(0)
            raise error

    broken = Broken(continuous, fail)
    budget = Budget(4096)
    runner = Runner({POOL: broken}, budget, Speed(1))  # type: ignore[dict-item]
    for result in runner.run(POOL, [job("encode", "a"), job("encode", "b")], [item_payload(picture())] * 2):
        good(result)
    assert budget.tokens == 1024
    assert broken.calls[0] == (2, continuous.pass_tokens)
    assert broken.calls[-1] == (2, 1024)


def test_an_item_that_fits_into_no_memory_is_told_so(continuous: Tokenizer) -> None:
    def fail(items: Sequence[Any]) -> None:
        if any(isinstance(item, Video) for item in items):
            raise torch.OutOfMemoryError("CUDA out of memory")

    budget = Budget(1024)
    runner = Runner({POOL: Broken(continuous, fail)}, budget, Speed(1))  # type: ignore[dict-item]
    large, fine = runner.run(POOL, [job("encode"), job("encode")], [item_payload(clip()), item_payload(picture())])
    assert isinstance(large, Failure)
    assert large.code == "item_too_large"
    good(fine)
    assert budget.tokens == FLOOR_TOKENS


def test_a_lost_device_ends_the_worker_not_the_items(continuous: Tokenizer) -> None:
    def fail(items: Sequence[Any]) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")

    with pytest.raises(DeviceLostError, match="illegal memory access"):
        run(Broken(continuous, fail), [job("encode"), job("encode")], [item_payload(picture())] * 2)  # type: ignore[arg-type]


def test_encode_and_decode_are_timed_apart(continuous: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one batch, in the effort that each of the two had to make."""
    now = 0.0

    class Slow:
        """Takes a second to encode and ten to decode, and fails on what is not decodable."""

        def __getattr__(self, name: str) -> Any:
            return getattr(continuous, name)

        def encode(self, *args: Any, **options: Any) -> Any:
            nonlocal now
            now += 1.0
            return continuous.encode(*args, **options)

        def decode(self, tokens: Any) -> Any:
            nonlocal now
            now += 10.0
            return continuous.decode(tokens)

    monkeypatch.setattr("service.worker.runner.time.perf_counter", lambda: now)
    tokens = continuous.encode([picture(32, 32)], {"latents"})[0]
    speed = Speed(1)
    jobs = [job("encode", "a"), job("encode", "b", outputs=["reconstruction"]), job("decode", "c"), job("decode", "d")]
    payloads = [item_payload(picture(32, 32)), item_payload(picture(32, 32)), tokens_payload(tokens), b"nonsense"]
    results = Runner({POOL: Slow()}, Budget(1024), speed).run(POOL, jobs, payloads)  # type: ignore[dict-item]
    assert [isinstance(result, Failure) for result in results] == [False, False, False, True]
    effort = effort_of(4, continuous.config.encoder.attention_tokens)
    assert effort == 3, "a token that has three others to look at takes less than one that has 255"
    assert speed.rates(POOL) == Rates(encode=2 * effort / 1.0, decode=2 * effort / 10.0)


def text_payload(text: str) -> bytes:
    return wire.dumps({}, {"kind": "text", "text": text})


def with_words(tokenizer: Tokenizer) -> Tokenizer:
    """The same network with a text side of three words."""
    words = WordTable(["bird", "castle", "cat"], torch.eye(3, tokenizer.config.encoder.width), torch.zeros(144))
    return Tokenizer(tokenizer.net, name=tokenizer.name, revision=tokenizer.revision, words=words)


def test_texts_are_answered_without_the_network_and_a_bad_one_fails_alone(continuous: Tokenizer) -> None:
    counting = Broken(with_words(continuous), lambda items: None)
    jobs = [job("embed", name, outputs=["embedding"]) for name in ("bird", "unknown", "picture", "castle")]
    payloads = [text_payload("a bird"), text_payload("xyzzy"), item_payload(picture()), text_payload("castles")]
    bird, unknown, seen, castle = run(counting, jobs, payloads)  # type: ignore[arg-type]
    assert [size for size, _ in counting.calls] == [1], "only the picture went through the network"
    assert unknown == Failure(
        code="invalid_parameter",
        detail="'xyzzy': no word of it is known; wanted plain English words for what can be seen",
    )
    for position, result in ((0, bird), (1, castle)):
        assert set(good(result).arrays) == {"embedding"}
        np.testing.assert_array_equal(good(result).arrays["embedding"], np.eye(3, 144, dtype=np.float32)[position])
        assert good(result).meta["revision"] == continuous.revision
        assert wire.loads(good(result).dump())[1]["notes"] == []
    np.testing.assert_allclose(good(seen).arrays["embedding"], continuous.embed([picture()])[0], atol=1e-5)


def test_words_that_do_not_count_are_noted(continuous: Tokenizer) -> None:
    tokenizer = with_words(continuous)
    many = "cat " + " ".join(f"xyz{letter}" for letter in "abcdefghijkl")
    texts = ["a Xyzzy bird, a xyzzy and a castle", many]
    first, second = run(tokenizer, [job("embed", name) for name in "ab"], [text_payload(text) for text in texts])
    assert good(first).meta["notes"] == ["words that are not known and do not count: xyzzy"]
    assert good(second).meta["notes"][0].endswith(": xyza, xyzb, xyzc, xyzd, xyze, xyzf, xyzg, xyzh, ...")


def test_a_text_has_an_embedding_and_nothing_else(continuous: Tokenizer) -> None:
    tokenizer = with_words(continuous)
    jobs = [job("embed", outputs=["embedding", "features"]), job("encode", outputs=["latents"])]
    for result in run(tokenizer, jobs, [text_payload("a bird")] * 2):
        assert isinstance(result, Failure)
        assert (result.code, "a text has an embedding, no" in result.detail) == ("unsupported_output", True)
    (without,) = run(continuous, [job("embed")], [text_payload("a bird")])
    assert isinstance(without, Failure)
    assert (without.code, "no text side" in without.detail) == ("unsupported_output", True)
