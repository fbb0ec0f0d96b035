# Two images from one file: `docker build --target api .` (no torch) and `docker build --target worker .` (torch, CUDA).
# .ci/run replays the steps of the stages build-api and build-worker in clean virtual environments, so that they cannot rot.
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_INPUT=1
WORKDIR /src
RUN python -m venv /opt/venv
RUN --mount=type=cache,target=/root/.cache/pip /opt/venv/bin/pip install pip==26.0
# First the dependencies alone (a package without sources), so that a change of the code does not install them again.
COPY pyproject.toml ./
RUN touch README.md

FROM build AS build-api
RUN --mount=type=cache,target=/root/.cache/pip /opt/venv/bin/pip install --only-binary=:all: ".[api]"
COPY README.md LICENSE ./
COPY media/ media/
COPY service/ service/
RUN --mount=type=cache,target=/root/.cache/pip /opt/venv/bin/pip install --no-deps --force-reinstall . \
    && /opt/venv/bin/pip check

FROM build AS build-worker
# Where no local file says otherwise, torch==2.13.0 is the CUDA 13 build; it brings the CUDA libraries with it.
RUN --mount=type=cache,target=/root/.cache/pip /opt/venv/bin/pip install --only-binary=:all: ".[worker]"
COPY README.md LICENSE ./
COPY media/ media/
COPY model/ model/
COPY service/ service/
RUN --mount=type=cache,target=/root/.cache/pip /opt/venv/bin/pip install --no-deps --force-reinstall . \
    && /opt/venv/bin/pip check

# What both images run on: Python alone, as nobody in particular, with nothing to write but /tmp.
FROM ${PYTHON_IMAGE} AS runtime
RUN groupadd --gid 10001 atoken \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin atoken
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /tmp
USER 10001:10001

FROM runtime AS worker
COPY --from=build-worker /opt/venv /opt/venv
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY deploy/worker_health.py /opt/atoken/worker_health.py
# The worker listens on no port: its health is what it last said in Redis. Loading large weights may take minutes.
HEALTHCHECK --interval=15s --timeout=10s --start-period=600s --retries=3 \
    CMD ["python", "/opt/atoken/worker_health.py"]
CMD ["atoken", "worker"]

FROM runtime AS api
COPY --from=build-api /opt/venv /opt/venv
# hadolint ignore=DL3064
ENV ATOKEN_HOST=0.0.0.0 \
    ATOKEN_PORT=8000
EXPOSE 8000
# Liveness, not readiness: an orchestrator that replaces unhealthy containers must not replace the API for want of a worker.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"ATOKEN_PORT\"]}/health/live', timeout=4)"]
CMD ["atoken", "serve"]
