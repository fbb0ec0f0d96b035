"""Shards as a Source: sample n of a kind is found by arithmetic, so that a run resumes anywhere on any number of ranks.

The order is random twice: the shards of a lane in each epoch, and the samples of a shard. A lane is every L-th shard;
neighbouring numbers come from different lanes, and with L a multiple of the ranks each rank reads only its own shards.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np

from media.errors import MediaError
from training.batches import Kind, Sample
from training.samples import sample_of
from training.shards import Record, Shard, read_shard
from training.stages import Stage

MODALITY: dict[Kind, str] = {
    "distill": "images",
    "image_rec": "images",
    "video_rec": "videos",
    "video_sem": "videos",
    "asset_rec": "assets",
    "asset_sem": "assets",
}
SLOTS = 1000
"""Samples after which the mixture of corpora repeats; shares are exact to 1 / SLOTS."""

TRIES = 16
"""Samples that may be bad in a row before the run stops."""


class BadSamplesError(RuntimeError):
    """More samples than allowed could not be used."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Shards of one origin. weight: its share among the corpora of a modality; None: by the number of its samples."""

    name: str
    shards: tuple[Shard, ...]
    weight: float | None = None

    @property
    def count(self) -> int:
        """Its samples."""
        return sum(shard.count for shard in self.shards)


@dataclass(frozen=True)
class Place:
    """Where a sample is."""

    shard: Shard
    index: int


class ShardSource:
    """A Source over corpora of images, videos and assets, for one stage.

    lanes: shards that are open at a time, over all ranks; a multiple of the ranks. workers: threads that decode.
    most_bad: share of samples that may be unusable, once `patience` were drawn.
    """

    def __init__(
        self,
        corpora: Mapping[str, Sequence[Corpus]],
        stage: Stage,
        *,
        seed: int = 0,
        lanes: int = 8,
        workers: int = 2,
        most_bad: float = 0.01,
        patience: int = 1000,
        log: Callable[[str], None] = print,
    ) -> None:
        kinds: list[Kind] = [*stage.cycle, *(["distill"] if stage.distill else [])]  # type: ignore[list-item]
        for kind in kinds:
            modality = MODALITY[kind]
            if not corpora.get(modality):
                raise ValueError(f"stage {stage.name} draws {kind}: no shards of {modality} are given")
        self.stage = stage
        self.seed = seed
        self.most_bad, self.patience = most_bad, patience
        self.log = log
        self.drawn = 0
        self.bad: Counter[str] = Counter()
        self._orders = {modality: _Mixture(list(given), seed, lanes) for modality, given in corpora.items() if given}
        self._cache = _ShardCache(lanes + 1, self._say)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._lock = Lock()
        self._said: set[str] = set()
        self._ahead: tuple[Kind, tuple[int, ...], list[Future[Sample]]] | None = None

    def draw(self, kind: Kind, numbers: Sequence[int]) -> list[Sample]:
        """See Source. Begins to decode what a next call for as many will ask for.

        Raises BadSamplesError past the allowed share.
        """
        wanted = tuple(numbers)
        if self._ahead is not None and self._ahead[:2] == (kind, wanted):
            futures = self._ahead[2]
        else:
            futures = [self._pool.submit(self._one, kind, number) for number in wanted]
        samples = [future.result() for future in futures]
        if len(wanted) > 1:
            step = wanted[1] - wanted[0]
            following = tuple(range(wanted[-1] + step, wanted[-1] + step * (len(wanted) + 1), step))
            self._ahead = (kind, following, [self._pool.submit(self._one, kind, number) for number in following])
        return samples

    def close(self) -> None:
        """Stop the workers."""
        self._pool.shutdown(cancel_futures=True)

    def _one(self, kind: Kind, number: int) -> Sample:
        """Sample `number`, or the first usable one after it in its shard."""
        place = self._orders[MODALITY[kind]].place(number)
        with self._lock:
            self.drawn += 1
        for step in range(TRIES):
            index = (place.index + step) % place.shard.count
            rng = np.random.default_rng([self.seed, zlib.crc32(kind.encode()), number, step])
            try:
                return sample_of(self._cache.record(place.shard, index), kind, self.stage, rng)
            except (MediaError, ValueError) as error:
                self._count(place.shard, index, error)
        raise BadSamplesError(f"{TRIES} samples of {place.shard.name} in a row cannot be used; see the lines before")

    def _count(self, shard: Shard, index: int, error: Exception) -> None:
        reason = error.code if isinstance(error, MediaError) else type(error).__name__
        with self._lock:
            self.bad[reason] += 1
            bad, drawn = self.bad.total(), self.drawn
        self._say(f"{shard.name}, sample {index}: left out: {error}")
        if drawn >= self.patience and bad > self.most_bad * drawn:
            reasons = ", ".join(f"{name} {count}" for name, count in self.bad.most_common())
            raise BadSamplesError(
                f"{bad} of {drawn} samples cannot be used ({reasons}); {self.most_bad:.1%} are allowed"
            )

    def _say(self, line: str) -> None:
        """Once."""
        with self._lock:
            new = line not in self._said
            self._said.add(line)
        if new:
            self.log(line)


class _Mixture:
    """Corpora in fixed shares: slot n mod SLOTS belongs to one of them."""

    def __init__(self, corpora: list[Corpus], seed: int, lanes: int) -> None:
        weights = np.array([corpus.count if corpus.weight is None else corpus.weight for corpus in corpora], float)
        if not weights.sum() > 0 or (weights < 0).any():
            raise ValueError(f"weights {weights.tolist()} of {', '.join(c.name for c in corpora)}; wanted some above 0")
        exact = weights / weights.sum() * SLOTS
        counts = np.floor(exact).astype(int)
        for index in np.argsort(counts - exact)[: SLOTS - counts.sum()]:
            counts[index] += 1
        owners = np.repeat(np.arange(len(corpora)), counts)
        self._owners = np.random.default_rng([seed, 1]).permutation(owners)
        self._counts = counts
        self._before = [np.cumsum(self._owners == index) for index in range(len(corpora))]
        self._orders = [_Order(corpus, seed, lanes) for corpus in corpora]

    def place(self, number: int) -> Place:
        if len(self._orders) == 1:
            return self._orders[0].place(number)
        turn, slot = divmod(number, SLOTS)
        owner = int(self._owners[slot])
        return self._orders[owner].place(turn * int(self._counts[owner]) + int(self._before[owner][slot]) - 1)


class _Order:
    """The endless order of one corpus."""

    def __init__(self, corpus: Corpus, seed: int, lanes: int) -> None:
        shards = [shard for shard in corpus.shards if shard.count]
        if not shards:
            raise ValueError(f"corpus {corpus.name} has no samples")
        self._seed = [seed, zlib.crc32(corpus.name.encode())]
        count = min(lanes, len(shards))
        self._lanes = [shards[lane::count] for lane in range(count)]

    def place(self, number: int) -> Place:
        turn, lane = divmod(number, len(self._lanes))
        shards = self._lanes[lane]
        epoch, index = divmod(turn, sum(shard.count for shard in shards))
        order = np.random.default_rng([*self._seed, lane, epoch]).permutation(len(shards))
        ends = list(itertools.accumulate(shards[i].count for i in order))
        at = int(np.searchsorted(ends, index, side="right"))
        shard = shards[order[at]]
        inside = index - (ends[at - 1] if at else 0)
        rng = np.random.default_rng([*self._seed, epoch, zlib.crc32(shard.name.encode())])
        return Place(shard, int(rng.permutation(shard.count)[inside]))


class _ShardCache:
    """The shards that were used last, whole in memory."""

    def __init__(self, most: int, say: Callable[[str], None]) -> None:
        self._most = most
        self._say = say
        self._held: OrderedDict[str, Future[list[Record]]] = OrderedDict()
        self._lock = Lock()

    def record(self, shard: Shard, index: int) -> Record:
        """Raises ValueError where the shard ends before it."""
        with self._lock:
            future = self._held.get(shard.place)
            mine = future is None
            if future is None:
                future = self._held[shard.place] = Future()
                while len(self._held) > self._most:
                    self._held.popitem(last=False)
            self._held.move_to_end(shard.place)
        if mine:
            try:
                records, problem = read_shard(shard.place)
            except BaseException as error:
                future.set_exception(error)  # or others would wait for ever
                raise
            future.set_result(records)
            if problem:
                self._say(problem)
        records = future.result()
        if index >= len(records):
            raise ValueError(f"the shard holds {len(records)} samples of {shard.count}")
        return records[index]
