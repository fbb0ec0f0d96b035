"""Shards for tests: written, as other tools make them, served over http."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from tests.training.tiny_run import recipe
from training.shard_file import Record
from training.shard_order import Corpus
from training.shard_source import ShardSource
from training.shards import Shard, ShardWriter, open_shards
from training.stages import Stage

STAGE = replace(recipe().stage("asset"), image_side=(16, 48), video_side=(16, 32), frames=(4, 8), strides=(1, 2))
IMAGES = replace(STAGE, cycle=("image_rec",), batch={"image_rec": 4}, distill=0)


def picture(seed: int, height: int = 40, width: int = 56) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_images(folder: Path, count: int, name: str = "images", each: int = 30_000) -> list[Shard]:
    """Sample n has the caption "NAME n"; about four samples to a shard of 30 kB."""
    with ShardWriter(folder, name, each) as writer:
        for number in range(count):
            writer.write(Record(f"{name}{number:04d}", "png", picture(number), f"{name} {number}"))
    return open_shards([str(folder / f"{name}-*.tar")])


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """As other tools do."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def corpus_of(shards: Sequence[Shard], weight: float | None = None) -> Corpus:
    return Corpus(name="c", shards=tuple(shards), weight=weight)


def source_of(*corpora: Corpus, stage: Stage = IMAGES, **options: Any) -> ShardSource:
    """Of images."""
    return ShardSource({"images": corpora}, stage, **{"log": lambda _: None, **options})


def captions(source: ShardSource, numbers: Sequence[int]) -> list[str]:
    with contextlib.closing(source):
        return [sample.caption for sample in source.draw("image_rec", numbers)]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Counts what is asked for."""

    asked: list[str]

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_GET(self) -> None:  # its name
        type(self).asked.append(self.path)
        super().do_GET()


@contextlib.contextmanager
def served(folder: Path, handler: type[Quiet] = Quiet) -> Iterator[str]:
    """The address of a folder. The requests that came are in handler.asked."""
    handler.asked = []
    made = functools.partial(handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), made) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
