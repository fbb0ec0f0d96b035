"""A batch on its way through the model: jobs in, results out, one packed encode and decode for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import structlog
import torch

from media.types import Item, PosedPictures, Text, Tokens, Voxels
from model import Tokenizer
from model.config import ModelConfig
from model.errors import ModelError, RangeError, UnsupportedError
from service.queue.estimate import Direction, effort_of
from service.queue.jobs import Job
from service.worker.budget import Budget
from service.worker.payloads import Output, decoded, embedded, encoded, read_item, read_pictures, read_tokens
from service.worker.speed import Speed
from service.worker.splatter import LateError, Splatter

log = structlog.get_logger(__name__)

SHOWN, SHOWN_WORDS = 50, 8
"""Characters of a word, and words, that a note repeats."""


class DeviceLostError(Exception):
    """The accelerator is lost to this process: every further call would fail, whatever the item."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why an item has no result: a stable code and a sentence for the client."""

    code: str
    detail: str


Result: TypeAlias = Output | Failure


class Runner:
    """Runs batches on the tokenizers of this worker, by pool. Synchronous: the model's thread calls it.

    One bad item does not fail its neighbours: what cannot be read is set aside first, and when a packed pass fails,
    its items run one by one. Out of memory halves the budget and the tokens of a pass, and the pass runs again.
    speed: is told how long each encode and decode took that went well. splatter: makes Gaussians of decoded voxels.
    """

    def __init__(
        self, tokenizers: Mapping[str, Tokenizer], budget: Budget, speed: Speed, splatter: Splatter | None = None
    ) -> None:
        self._tokenizers = dict(tokenizers)
        self._splatter = splatter
        self._full_pass = {pool: tokenizer.pass_tokens for pool, tokenizer in tokenizers.items()}
        self._budget = budget
        self._speed = speed

    def run(self, pool: str, jobs: Sequence[Job], payloads: Sequence[bytes]) -> list[Result]:
        """Return one result a job, in order. Raises DeviceLostError."""
        tokenizer = self._tokenizers[pool]
        self._set_pass_tokens(pool)
        works = [_Work(job, payload) for job, payload in zip(jobs, payloads, strict=True)]
        for work in works:
            self._run_step(pool, [work], _read)
        for work in works:
            # One by one: there is no network to fill, and each fails alone.
            self._run_step(pool, [work] if work.is_to_look_up else [], _look_up)
        for latents_only in (False, True):
            group = [
                work for work in works if work.item is not None and work.wants_latents_only(tokenizer) == latents_only
            ]
            self._run_step(pool, group, _encode, "encode")
        self._run_step(pool, [work for work in works if work.is_to_decode], _decode, "decode")
        for work in works:
            # One by one: their rendering is most of the work, and is not packed.
            self._run_step(pool, [work] if work.is_to_splat else [], self._splat)
        return [work.result or work.output() for work in works]

    def _run_step(
        self,
        pool: str,
        works: Sequence[_Work],
        step: Callable[[Tokenizer, Sequence[_Work]], None],
        direction: Direction | None = None,
    ) -> None:
        """Run one step for all works, and on failure for one after the other; failed works get their result."""
        if not works:
            return
        again: Literal["smaller", "alone"] | None = None
        try:
            begin = time.perf_counter()
            step(self._tokenizers[pool], works)
            if direction is not None:
                seconds = time.perf_counter() - begin
                config = self._tokenizers[pool].config
                self._speed.add(pool, direction, sum(work.effort(config) for work in works), seconds)
        except Exception as error:
            if _is_device_fault(error):
                raise DeviceLostError(str(error).splitlines()[0]) from error
            if _is_out_of_memory(error) and self._budget.shrink():
                again = "smaller"
            elif len(works) > 1:
                again = "alone"
            else:
                works[0].result = _failure(works[0].job, error)
        # Out of the handler: its traceback would keep the failed pass's tensors alive.
        if again == "smaller":
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._set_pass_tokens(pool)
            log.warning("out_of_memory", items=len(works), budget_tokens=self._budget.tokens)
            self._run_step(pool, works, step, direction)
        elif again == "alone":
            for work in works:
                self._run_step(pool, [work], step, direction)

    def _splat(self, tokenizer: Tokenizer, works: Sequence[_Work]) -> None:
        for work in works:
            if self._splatter is None:
                raise UnsupportedError(f"{tokenizer.name!r} has no Gaussian decoder here: voxels stay voxels")
            assert isinstance(work.picture, Voxels)
            options, deadline = work.job.options, work.job.deadline
            work.splats = self._splatter.run(work.picture, options.get("splats"), work.pictures, deadline)

    def _set_pass_tokens(self, pool: str) -> None:
        shrunk = self._budget.tokens < self._budget.full
        full = self._full_pass[pool]
        self._tokenizers[pool].pass_tokens = min(full, self._budget.tokens) if shrunk else full


class _Work:
    """One job on its way: what came in and what the model made of it so far. result is set early only by a failure."""

    def __init__(self, job: Job, payload: bytes) -> None:
        self.job = job
        self.payload = payload
        default = ("embedding",) if job.op == "embed" else ("latents",)
        self.outputs: tuple[str, ...] = tuple(job.options.get("outputs") or default)
        self.item: Item | None = None
        self.text: Text | None = None
        self.tokens: Tokens | None = None
        self.picture: Item | None = None
        self.pictures: PosedPictures | None = None
        self.splats: Output | None = None
        self.result: Result | None = None

    @property
    def is_to_look_up(self) -> bool:
        """Whether it is a text, which the words of the model answer without its network."""
        return self.result is None and self.text is not None

    @property
    def is_to_decode(self) -> bool:
        """Whether the decoder still has to see it."""
        return self.result is None and (self.job.op == "decode" or "reconstruction" in self.outputs)

    @property
    def is_to_splat(self) -> bool:
        """Whether its decoded voxels become Gaussians: a reconstruction's do, a decode job's where it says so."""
        if self.result is not None or not isinstance(self.picture, Voxels):
            return False
        return self.job.op != "decode" or self.job.options.get("splats") is not None

    def effort(self, config: ModelConfig) -> int:
        """What it took, once it was encoded or before it is decoded."""
        assert self.tokens is not None
        steps = self.tokens.layout.grid[0]
        return effort_of(self.job.cost, config.encoder.attention_tokens, steps, config.window)

    def wants_latents_only(self, tokenizer: Tokenizer) -> bool:
        """Whether it asks a model that gives codes for the latents instead: one encode gives one of the two."""
        return (
            self.result is None
            and "codes" in tokenizer.outputs
            and "latents" in self.outputs
            and "codes" not in self.outputs
        )

    def output(self) -> Output:
        """Return the result of a work that went well."""
        if self.job.op == "decode":
            assert self.picture is not None
            return self.splats or decoded(self.picture)
        assert self.item is not None
        assert self.tokens is not None
        reconstruction = self.splats or (decoded(self.picture) if self.picture is not None else None)
        return encoded(self.tokens, self.outputs, reconstruction, self.item.notes)


def _read(tokenizer: Tokenizer, works: Sequence[_Work]) -> None:
    for work in works:
        if work.job.op == "decode":
            tokens = read_tokens(work.payload)
            # `force` decodes another model's tokens, where the shapes allow it.
            work.tokens = replace(tokens, revision=tokenizer.revision) if work.job.options.get("force") else tokens
            if work.tokens.revision != tokenizer.revision:
                raise _ModelMismatchError(
                    f"the tokens are of {tokens.model!r} with weights {tokens.revision[:12]}, "
                    f"this is {tokenizer.name!r} with weights {tokenizer.revision[:12]}"
                )
        else:
            unknown = sorted(set(work.outputs) - {*tokenizer.outputs, "reconstruction"})
            if unknown:
                raise UnsupportedError(
                    f"{tokenizer.name!r} does not give {', '.join(unknown)}; "
                    f"it gives {', '.join((*tokenizer.outputs, 'reconstruction'))}"
                )
            if work.job.options.get("sample") and work.job.options.get("seed") is None:
                raise RangeError("sample=true without a seed; wanted seed=0 or any other whole number")
            item = read_item(work.payload)
            if isinstance(item, Text):
                if set(work.outputs) != {"embedding"}:
                    raise UnsupportedError(f"a text has an embedding, no {', '.join(work.outputs)}")
                work.text = item
            else:
                work.item = item
                work.pictures = read_pictures(work.payload)


def _look_up(tokenizer: Tokenizer, works: Sequence[_Work]) -> None:
    for work in works:
        assert work.text is not None
        text = work.text.text
        (embedding,) = tokenizer.embed_texts([text])
        unknown = tokenizer.words.unknown(text) if tokenizer.words else []
        shown = ", ".join(word[:SHOWN] for word in unknown[:SHOWN_WORDS]) + (", ..." if unknown[SHOWN_WORDS:] else "")
        notes = [f"words that are not known and do not count: {shown}"] if unknown else []
        work.result = embedded(embedding, tokenizer.name, tokenizer.revision, notes)


def _encode(tokenizer: Tokenizer, works: Sequence[_Work]) -> None:
    wanted: set[str] = set()
    for work in works:
        wanted |= set(work.outputs) - {"reconstruction"}
        if "reconstruction" in work.outputs and not work.wants_latents_only(tokenizer):
            wanted.add("codes" if "codes" in tokenizer.outputs else "latents")
    options = [work.job.options for work in works]
    results = tokenizer.encode(
        [work.item for work in works if work.item is not None],
        wanted,
        fit=[each.get("fit") or "pad" for each in options],
        seeds=[each.get("seed") if each.get("sample") else None for each in options],
    )
    for work, tokens in zip(works, results, strict=True):
        work.tokens = tokens


def _decode(tokenizer: Tokenizer, works: Sequence[_Work]) -> None:
    pictures = tokenizer.decode([work.tokens for work in works if work.tokens is not None])
    for work, picture in zip(works, pictures, strict=True):
        work.picture = picture


class _ModelMismatchError(ModelError):
    """Tokens of other weights."""


def _failure(job: Job, error: Exception) -> Failure:
    """What the client is told. Anything but a refusal of the input is a fault of ours: logged, not told."""
    if isinstance(error, _ModelMismatchError):
        return Failure(code="model_mismatch", detail=str(error))
    if isinstance(error, ModelError):
        if job.op == "decode":
            return Failure(code="invalid_token_file", detail=str(error))
        return Failure(
            code="unsupported_output" if isinstance(error, UnsupportedError) else "invalid_parameter", detail=str(error)
        )
    if isinstance(error, LateError):
        return Failure(code="deadline_exceeded", detail=str(error))
    if _is_out_of_memory(error):
        return Failure(
            code="item_too_large", detail=f"the item of {job.cost} tokens needs more memory than the worker has"
        )
    log.error("item_failed", job=job.id, request_id=job.request_id, op=job.op, cost=job.cost, exc_info=error)
    return Failure(code="internal", detail="an unexpected fault; the worker's log has it under the request id")


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _is_device_fault(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))
