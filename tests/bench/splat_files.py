"""Bytes a Gaussian of each file format, and how far a turn is off when it comes back.

    python -m tests.bench.splat_files [--count 100000]

Gaussians of random places, colours, sizes and turns: what packs worst.
"""

import argparse

from media.splat_files import SPLAT_FILES
from tests.media.test_splat_files import DECODERS, by_visibility, degrees, gaussians


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    given = gaussians(parser.parse_args().count)
    print("| format | bytes a Gaussian | largest error of a turn, degrees |\n|---|---|---|")
    for name, file in SPLAT_FILES.items():
        data = file.encode(given)
        sent = by_visibility(given) if name == "splat" else given
        error = degrees(DECODERS[name](data).rotations, sent.rotations).max()
        print(f"| {name} | {len(data) / len(given):.1f} | {error:.2f} |", flush=True)


if __name__ == "__main__":
    main()
