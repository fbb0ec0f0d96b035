"""Run a directory of conformance cases and say how far off each tensor is.

A case is a folder: case.json (kind, limits), config.json, input.safetensors, expected.safetensors and, for networks,
weights.safetensors, another case's weights, or weights by rule. One folder or a folder of folders can be given.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from model.errors import ModelError
from model.verify_cases import KINDS, SHIPPED, Arrays, Kind, UnreadableError, read_json

__all__ = ["SHIPPED", "Row", "UnreadableError", "find_cases", "main_report", "rowwise_error", "run_case"]


@dataclass(frozen=True)
class Row:
    """One tensor of one case. error is infinite for a tensor that was not produced or has another shape."""

    case: str
    tensor: str
    measure: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Within its limit."""
        return self.error <= self.limit


def main_report(
    path: Path,
    device: str = "cpu",
    dtype: str = "float32",
    dump: Path | None = None,
    kinds: Mapping[str, Kind] = KINDS,
    every: bool = False,
) -> int:
    """Print a line per case, one per tensor that fails, and a summary.

    dump: folder for what was computed, one safetensors file a case. kinds: what to run for each kind of case; others
    are skipped and counted. every: print all tensors.
    Returns the exit status: 0 all pass, 1 a tensor fails or is missing, 2 an unreadable folder.
    """
    try:
        failed = total = skipped = 0
        worst: Row | None = None
        for folder in find_cases(path):
            case = read_json(folder / "case.json")
            if case.get("kind") not in kinds:
                print(f"{folder.name}: skipped, kind {case.get('kind')!r} is not known here")
                skipped += 1
                continue
            rows, computed = run_case(folder, torch.device(device), getattr(torch, dtype), kinds=kinds)
            for row in rows:
                if every or not row.passed:
                    print(_line(row))
                failed += not row.passed
                if row.measure == "rowwise_rel" and (worst is None or row.error > worst.error):
                    worst = row
            if rows:
                print(_case_line(rows))
            total += len(rows)
            if dump is not None:
                dump.mkdir(parents=True, exist_ok=True)
                save_file(
                    {name: np.ascontiguousarray(array) for name, array in computed.items()},
                    dump / f"{folder.name}.safetensors",
                )
    except UnreadableError as error:
        print(f"atoken verify: {error}", file=sys.stderr)
        return 2
    if worst is not None:
        print(f"worst row-wise error: {worst.error:.2e} ({worst.case}, {worst.tensor})")
    print(f"{total - failed} passed, {failed} failed, {skipped} skipped ({device}, {dtype})")
    return 1 if failed else 0


def _line(row: Row) -> str:
    verdict = "pass" if row.passed else "FAIL"
    return f"{row.case:18} {row.tensor:32} {row.measure:12} {row.error:9.2e} of {row.limit:7.0e}  {verdict}"


def _case_line(rows: Sequence[Row]) -> str:
    """A case in one line: the tensor that is nearest to its limit."""
    failed = sum(not row.passed for row in rows)
    found = f"{failed} FAIL" if failed else "pass"
    inexact = [row for row in rows if row.limit]
    if not inexact:
        return f"{rows[0].case:18} {len(rows):3} tensors, to be equal: {found}"
    near = max(inexact, key=lambda row: row.error / row.limit)
    return (
        f"{near.case:18} {len(rows):3} tensors, at most {near.error:.1e} of {near.limit:.0e} ({near.tensor}): {found}"
    )


def find_cases(path: Path) -> list[Path]:
    """The folder itself if it is a case, else its direct subfolders that are. Raises UnreadableError if none is."""
    if (path / "case.json").is_file():
        return [path]
    folders = sorted(case.parent for case in path.glob("*/case.json"))
    if not folders:
        raise UnreadableError(f"{path}: no case.json in it or directly below it")
    return folders


def run_case(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    one_by_one: bool = False,
    kinds: Mapping[str, Kind] = KINDS,
) -> tuple[list[Row], Arrays]:
    """Compute a case and compare it. one_by_one: kind "model" runs each item in a pass of its own, not packed.

    Returns a row per expected tensor, and all that was computed. Raises UnreadableError.
    """
    case = read_json(folder / "case.json")
    run = kinds[case["kind"]]
    # A case that names its files may keep its inputs in others: pictures, cameras.
    has_tensors = "input.safetensors" in case.get("files", ["input.safetensors"])
    try:
        inputs = load_file(folder / "input.safetensors") if has_tensors else {}
        expected = load_file(folder / "expected.safetensors")
    except (OSError, SafetensorError) as error:
        raise UnreadableError(f"{folder}: {error}") from error
    try:
        computed = run(folder, inputs, device, dtype, one_by_one)
    except (ModelError, KeyError) as error:
        raise UnreadableError(f"{folder}: {type(error).__name__}: {error}") from error
    return [_compare(case, name, computed.get(name), expected[name]) for name in sorted(expected)], computed


def rowwise_error(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    """Largest over rows (first axis) of |got - want| / max(|want|, 1e-12), in float64."""
    got, want = (
        np.asarray(a, np.float64).reshape(len(want), -1) if want.ndim else np.asarray(a, np.float64).reshape(1, 1)
        for a in (got, want)
    )
    if want.size == 0:
        return 0.0
    error = np.linalg.norm(got - want, axis=1) / np.maximum(np.linalg.norm(want, axis=1), 1e-12)
    return float(np.where(np.isnan(error), np.inf, error).max())


def _compare(case: Mapping[str, Any], name: str, got: np.ndarray[Any, Any] | None, want: np.ndarray[Any, Any]) -> Row:
    rule = next(rule for rule in case["limits"] if fnmatch.fnmatchcase(name, rule["match"]))
    measure, limit = rule["measure"], float(rule.get("limit", 0))
    if got is None or got.shape != want.shape:
        return Row(case["name"], name, measure, float("inf"), limit)
    if measure == "rowwise_rel":
        error = rowwise_error(got, want)
    elif want.size == 0:
        error = 0.0
    else:
        error = float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max())
        error = float("inf") if np.isnan(error) else error
    return Row(case["name"], name, measure, error, limit)
