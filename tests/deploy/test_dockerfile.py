"""The Dockerfile without an engine: the linter, and what it promises. .ci/run replays its install steps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.deploy import dockerfile
from tests.deploy.routes import get_routes
from tests.paths import ROOT

STAGES = dockerfile.read()


def _hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    linter = Path(sys.executable).with_name("hadolint")
    return subprocess.run(
        [linter, "--config", ROOT / ".hadolint.yaml", path], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_linter_finds_nothing() -> None:
    done = _hadolint(ROOT / "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_linter_would_find_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python:3.11-slim\nRUN cd /tmp && apt-get install curl\n")
    assert _hadolint(bad).returncode == 1


@pytest.mark.parametrize("target", ["api", "worker"])
def test_target_is_unprivileged_and_has_a_health_check(target: str) -> None:
    assert dockerfile.last(STAGES, target, "USER") == "10001:10001"
    assert dockerfile.healthcheck(STAGES, target)[0] == "python", "there is no curl in the image"
    # The build's tools stay behind: only the environment is taken over.
    copies = [text for stage in dockerfile.chain(STAGES, target) for text in stage.texts("COPY")]
    assert f"--from=build-{target} /opt/venv /opt/venv" in copies


@pytest.mark.parametrize("target", ["api", "worker"])
def test_target_starts_a_command_that_exists(target: str) -> None:
    words = dockerfile.command(STAGES, target)
    assert words[0] == "atoken"
    code = "import sys; from service.cli.main import main; sys.argv[0] = 'atoken'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words[1:], "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert f"atoken {words[1]}" in done.stdout


def test_api_has_no_torch_and_no_model() -> None:
    steps = [text for stage in dockerfile.chain(STAGES, "build-api") for _, text in stage.steps]
    assert any(".[api]" in text for text in steps)
    assert not any("worker" in text or "local" in text or "model/" in text for text in steps)


def test_api_health_check_names_a_real_route() -> None:
    code = " ".join(dockerfile.healthcheck(STAGES, "api"))
    found = re.search(r"http://127\.0\.0\.1:\S+?(/[a-z/]+)'", code)
    assert found, code
    assert found[1] == "/health/live"
    assert urlsplit(found[1]).path in get_routes()


@pytest.mark.parametrize("target", ["api", "worker"])
def test_dependencies_are_a_layer_of_their_own(target: str) -> None:
    """Only pyproject.toml is copied before the dependencies: a change of the code must not install them again."""
    steps = [step for stage in dockerfile.chain(STAGES, f"build-{target}") for step in stage.steps]
    install = next(i for i, (name, text) in enumerate(steps) if name == "RUN" and f".[{target}]" in text)
    assert [text for name, text in steps[:install] if name == "COPY"] == ["pyproject.toml ./"]
    assert "--only-binary=:all:" in steps[install][1], "there is no compiler in the image"
    assert any(re.search(r"pip install pip==\d+", text) for _, text in steps[:install])


def test_build_steps_stay_in_the_folders_that_replay_moves() -> None:
    for target in ("build-api", "build-worker"):
        for stage in dockerfile.chain(STAGES, target):
            for text in [*stage.texts("RUN"), *stage.texts("WORKDIR"), *stage.texts("COPY")]:
                words = re.sub(r"--mount=\S+", "", text)
                paths = re.findall(r"(?<![\w.\]])/[\w./-]+", words)
                assert all(path.startswith(("/opt/", "/src")) for path in paths), text


def test_build_context_holds_what_is_copied() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:].rstrip("/") for line in lines if line.startswith("!")}
    sources = {
        word.rstrip("/")
        for stage in STAGES.values()
        for text in stage.texts("COPY")
        if not text.startswith("--from")
        for word in text.split()[:-1]
    }
    assert sources == allowed, "the Dockerfile and .dockerignore name different files"
    assert all((ROOT / source).exists() for source in sources)
