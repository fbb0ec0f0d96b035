"""docker-compose.yml without an engine: the compose specification, and what the file promises."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from service.queue.server import find_binary
from service.settings import Settings
from tests.deploy import dockerfile
from tests.deploy.routes import get_routes
from tests.paths import ROOT

TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
STAGES = dockerfile.read()


def _check(path: Path) -> subprocess.CompletedProcess[str]:
    checker = Path(sys.executable).with_name("check-jsonschema")
    return subprocess.run(
        [checker, "--builtin-schema", "vendor.compose-spec", path], capture_output=True, text=True, timeout=60
    )


def test_file_follows_the_compose_specification() -> None:
    done = _check(ROOT / "docker-compose.yml")
    assert done.returncode == 0, done.stdout


def test_a_typo_would_be_found(tmp_path: Path) -> None:
    bad = tmp_path / "docker-compose.yml"
    bad.write_text(TEXT.replace("depends_on:", "depend_on:", 1))
    assert _check(bad).returncode == 1


@pytest.mark.parametrize("name", ["redis", "api", "worker"])
def test_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert service["tmpfs"], "a read-only container needs a place for temporary files"
    assert "privileged" not in service
    assert "cap_add" not in service


def test_only_the_api_is_reachable_and_only_from_this_host() -> None:
    ports = {name: service.get("ports", []) for name, service in SERVICES.items()}
    assert ports == {"redis": [], "api": ["127.0.0.1:${ATOKEN_PORT:-8000}:8000"], "worker": []}
    assert COMPOSE["networks"]["queue"]["internal"] is True
    assert SERVICES["redis"]["networks"] == SERVICES["worker"]["networks"] == ["queue"]


def test_the_password_is_required_and_has_no_default() -> None:
    uses = re.findall(r"\$\{ATOKEN_REDIS_PASSWORD([^}]*)\}", TEXT)
    assert uses
    assert all(use.startswith(":?") and "set it" in use for use in uses)


def test_images_are_built_from_targets_that_exist() -> None:
    for name in ("api", "worker"):
        assert SERVICES[name]["build"]["target"] == name
        assert name in STAGES
        assert dockerfile.healthcheck(STAGES, name) or "healthcheck" in SERVICES[name]


def test_start_order_and_health() -> None:
    for name in ("api", "worker"):
        assert SERVICES[name]["depends_on"] == {"redis": {"condition": "service_healthy"}}
    code = SERVICES["api"]["healthcheck"]["test"][-1]
    route = re.search(r"http://127\.0\.0\.1:8000(/[a-z/]+)", code)
    assert route, code
    assert route[1] == "/health/ready"
    assert route[1] in get_routes()


def test_worker_gets_the_gpu_and_weights_that_it_cannot_change() -> None:
    worker = SERVICES["worker"]
    assert worker["deploy"]["resources"]["reservations"]["devices"] == [
        {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    ]
    (volume,) = worker["volumes"]
    assert volume.endswith(":/weights:ro")


def test_every_variable_is_a_setting() -> None:
    """A misspelled ATOKEN_ variable would be ignored without a word."""
    fields = {f"ATOKEN_{name.upper()}" for name in Settings.model_fields}
    for name in ("api", "worker"):
        assert set(SERVICES[name]["environment"]) <= fields
    for name in ("api", "worker"):
        variables = {key for key in dockerfile.environment(STAGES, name) if key.startswith("ATOKEN_")}
        assert variables <= fields


@pytest.fixture
def server(tmp_path: Path) -> Iterator[redis.Redis]:
    """The compose file's own Redis command, run by the server binary that a package brings."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "valkey-server").symlink_to(find_binary())
    for name in ("data", "tmp"):
        (tmp_path / name).mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    *shell, script = SERVICES["redis"]["command"]
    script = script.replace("$$", "$").replace("/tmp/", f"{tmp_path}/tmp/").replace("/data", f"{tmp_path}/data")
    script = script.rstrip() + f" --port {port} --bind 127.0.0.1\n"
    environment = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "ATOKEN_REDIS_PASSWORD": "0f" * 32}
    default = SERVICES["redis"]["environment"]["ATOKEN_REDIS_MAXMEMORY"]
    environment["ATOKEN_REDIS_MAXMEMORY"] = default.partition(":-")[2].rstrip("}")
    process = subprocess.Popen([*shell, script], env=environment, stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(port=port, password="0f" * 32, socket_timeout=5) as client:
            _wait_for(client)
            yield client
    finally:
        process.terminate()
        process.wait(timeout=20)


def _wait_for(client: redis.Redis) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            client.ping()
        except redis.ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def test_redis_starts_as_the_queue_needs_it(server: redis.Redis) -> None:
    config = server.config_get("maxmemory*", "append*")
    assert config["maxmemory"] == str(4 << 30)
    assert config["maxmemory-policy"] == "noeviction"
    assert (config["appendonly"], config["appendfsync"]) == ("yes", "everysec")
    stranger = redis.Redis(port=server.connection_pool.connection_kwargs["port"], socket_timeout=5)
    with stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
