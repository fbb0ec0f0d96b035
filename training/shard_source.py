"""Shards as a Source: sample n of a kind is found by arithmetic, so that a run resumes anywhere on any number of ranks.

Samples are decoded by threads, a step ahead. One that cannot be used is replaced by another of its lane.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Lock

import numpy as np

from media.errors import MediaError
from training.batches import Kind, Sample
from training.samples import sample_of
from training.shard_file import OpenShard
from training.shard_order import Corpus, Mixture
from training.shards import Shard
from training.stages import Stage

MODALITY: dict[Kind, str] = {
    "distill": "images",
    "image_rec": "images",
    "video_rec": "videos",
    "video_sem": "videos",
    "asset_rec": "assets",
    "asset_sem": "assets",
}
TRIES = 16
"""Samples that may be bad in a row before the run stops, at least. The last of them is 4^15 places away."""

MOST_TRIES = 1000
CHANCE = 1e-9
"""Of so many bad ones in a row where the allowed share is bad: only then they are no chance any more."""


class BadSamplesError(RuntimeError):
    """More samples than allowed could not be used."""


class ShardSource:
    """A Source over corpora of images, videos and assets, for one stage.

    lanes: shards that are read side by side, over all ranks; part of the order, so the same for all of a run. ranks:
    that share them. workers: threads that decode. most_bad: share that may be lost, of all samples to shards that
    cannot be read, and of those drawn to what cannot be decoded (once `patience` were drawn). drawn: samples that were
    decoded or tried, also those in the place of others; bad: of them, by reason.
    """

    def __init__(
        self,
        corpora: Mapping[str, Sequence[Corpus]],
        stage: Stage,
        *,
        seed: int = 0,
        lanes: int = 8,
        ranks: int = 1,
        workers: int = 2,
        most_bad: float = 0.01,
        patience: int = 1000,
        log: Callable[[str], None] = print,
    ) -> None:
        kinds: list[Kind] = [*dict.fromkeys(stage.cycle), *(["distill"] if stage.distill else [])]  # type: ignore[list-item]
        for kind in kinds:
            modality = MODALITY[kind]
            if not corpora.get(modality):
                raise ValueError(f"stage {stage.name} draws {kind}: no shards of {modality} are given")
        if lanes < 1:
            raise ValueError(f"{lanes} lanes; wanted 1 or more")
        self.stage = stage
        self.most_bad, self.patience = most_bad, patience
        self.log = log
        self.drawn = 0
        self.bad: Counter[str] = Counter()
        self._tries = tries_of(most_bad)
        self._lanes = lanes
        self._seed = [seed, zlib.crc32(stage.name.encode())]
        self._mixtures = {modality: Mixture(given, self._seed, lanes) for modality, given in corpora.items() if given}
        self._order = {"lanes": str(lanes), "seed": str(seed)}
        self._order |= {modality: _words(given) for modality, given in corpora.items() if given}
        self._counts = {modality: sum(corpus.count for corpus in given) for modality, given in corpora.items()}
        self._lost: dict[str, dict[str, int]] = {modality: {} for modality in corpora}
        # Each kind is somewhere else in its order. With too few places every sample would open its shard anew.
        mine = lanes // math.gcd(lanes, ranks)
        self._stopped = Event()
        self._shelf = _Shelf(mine * (1 + sum(len(self._mixtures[MODALITY[kind]]) for kind in kinds)), self._open)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._lock = Lock()
        self._said: set[str] = set()
        self._ahead: dict[tuple[Kind, int], Future[Sample]] = {}

    def draw(self, kind: Kind, numbers: Sequence[int]) -> list[Sample]:
        """See Source. Raises BadSamplesError past the allowed share."""
        self.ahead(kind, numbers)
        futures = [self._ahead.pop((kind, number)) for number in numbers]
        return [future.result() for future in futures]

    def ahead(self, kind: Kind, numbers: Sequence[int]) -> None:
        """See Source."""
        for number in numbers:
            if (kind, number) not in self._ahead:
                self._ahead[kind, number] = self._pool.submit(self._one, kind, number)

    def left_out(self) -> int:
        """See Source. With what shards should have and have not, once for each shard that was opened."""
        with self._lock:
            return self.bad.total() + sum(sum(lost.values()) for lost in self._lost.values())

    def order(self) -> dict[str, str]:
        """See Source. Where the shards lie has no say, and neither has how they are read."""
        return dict(self._order)

    def close(self) -> None:
        """Stop the workers at the sample they are at, and close the shards; say once more what was left out."""
        first = not self._stopped.is_set()
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)
        self._ahead.clear()
        self._shelf.clear()
        if first and self.left_out():
            self.log(f"stage {self.stage.name}: {self._account()}")

    def _account(self) -> str:
        """What was left out, in words."""
        parts = []
        if self.bad:
            bad = self.bad.total()
            parts.append(f"{bad} of {self.drawn} samples that were drawn cannot be used ({self._reasons()})")
        for modality, lost in self._lost.items():
            if lost:
                parts.append(f"{sum(lost.values())} of {self._counts[modality]} {modality} cannot be read")
        return "; ".join(parts)

    def _reasons(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in self.bad.most_common())

    def _one(self, kind: Kind, number: int) -> Sample:
        """Sample `number`, or the first usable one after it."""
        modality = MODALITY[kind]
        for step in range(self._tries):
            if step and self._stopped.is_set():
                break
            # In its lane: first near, where the shard is open already, then further and further, out of a bad shard;
            # the same again from other places, where very many may be bad.
            again, near = divmod(step, TRIES)
            place = self._mixtures[modality].place(number + self._lanes * (4**near - 1 + 7919 * again))
            shard = self._shelf.get(place.shard)
            if len(shard) < place.shard.count:
                self._lose(modality, place.shard, place.shard.count - len(shard))
            if not len(shard):
                continue
            with self._lock:
                self.drawn += 1
            rng = np.random.default_rng([*self._seed, zlib.crc32(kind.encode()), number, step])
            index = place.index % len(shard)
            try:
                return sample_of(shard.record(index), kind, self.stage, rng)
            except Exception as error:  # whatever a decoder thinks of damaged data: one sample is no reason to stop
                self._count(place.shard, index, error)
        raise BadSamplesError(
            f"{step + 1} samples in a row cannot be used, of which {self.most_bad:.1%} may be bad; "
            "the reasons are in the lines before"
        )

    def _open(self, shard: Shard) -> OpenShard:
        found = OpenShard(shard.place, self._stopped)
        if found.problem:
            self._say(f"{found.problem}; {len(found)} samples of {shard.count} are used")
        elif len(found) != shard.count:
            self._say(f"{shard.place}: {len(found)} samples, {shard.count} by the index, which is of another shard")
        return found

    def _lose(self, modality: str, shard: Shard, count: int) -> None:
        """Samples that a shard should have, once for each shard."""
        with self._lock:
            lost = self._lost[modality]
            lost[shard.place] = count
            total = sum(lost.values())
        allowed = self.most_bad * self._counts[modality]
        if total > allowed:
            raise BadSamplesError(
                f"{total} of {self._counts[modality]} {modality} cannot be read (last of {shard.place}); "
                f"{self.most_bad:.1%} may be lost"
            )

    def _count(self, shard: Shard, index: int, error: Exception) -> None:
        reason = error.code if isinstance(error, MediaError) else type(error).__name__
        with self._lock:
            self.bad[reason] += 1
            bad, drawn = self.bad.total(), self.drawn
        self._say(f"{shard.name}, sample {index}: left out: {error or reason}")
        allowed = self.most_bad * drawn
        # Four deviations of chance: of many ranks that each see a part, one would soon be unlucky.
        if drawn >= self.patience and bad > allowed + 4 * math.sqrt(allowed):
            raise BadSamplesError(
                f"{bad} of {drawn} samples cannot be used ({self._reasons()}); {self.most_bad:.1%} are allowed"
            )

    def _say(self, line: str) -> None:
        """Once."""
        with self._lock:
            new = line not in self._said and not self._stopped.is_set()
            self._said.add(line)
        if new:
            self.log(line)


def tries_of(most_bad: float) -> int:
    """Bad samples in a row that are no chance if `most_bad` of all are bad."""
    if most_bad >= 1:
        return MOST_TRIES
    enough = math.log(CHANCE) / math.log(most_bad) if most_bad > 0 else 0.0
    return min(MOST_TRIES, max(TRIES, math.ceil(enough)))


def _words(corpora: Sequence[Corpus]) -> str:
    """Samples, shards, and a checksum of names, counts and weights in their order."""
    shards = [[(shard.name, shard.count) for shard in corpus.shards] for corpus in corpora]
    weights = [corpus.weight for corpus in corpora]
    digits = zlib.crc32(repr((shards, weights)).encode())
    return f"{sum(corpus.count for corpus in corpora)} in {sum(map(len, shards))} shards, {digits:08x}"


class _Shelf:
    """The shards that were used last, open. Each is opened by the first thread that wants it; others wait."""

    def __init__(self, most: int, opened: Callable[[Shard], OpenShard]) -> None:
        self._most = most
        self._opened = opened
        self._held: OrderedDict[str, Future[OpenShard]] = OrderedDict()
        self._lock = Lock()

    def get(self, shard: Shard) -> OpenShard:
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
                future.set_result(self._opened(shard))
            except BaseException as error:
                future.set_exception(error)  # or others would wait for ever
        return future.result()

    def clear(self) -> None:
        with self._lock:
            self._held.clear()
