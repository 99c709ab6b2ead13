# syntax=docker/dockerfile:1
# Two images: `gpu` (the default) and `cpu`.
#   docker build -t megatron-ssft .
#   docker build -t megatron-ssft:cpu --target cpu .
# Both work under any user id with a read-only root (Enroot, Apptainer, docker run --user): what they hold is readable
# by everyone, and they write where the command line says, and to /tmp. HOME is left to the runtime: pyxis prefers the
# image's variables to the job's, and a fixed folder of compiled kernels in a shared /tmp could be another user's.

FROM python:3.11-slim-bookworm AS wheel
WORKDIR /source
COPY LICENSE setup.py pyproject.toml ./
COPY megatron_ssft ./megatron_ssft
COPY requirements ./requirements
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.11-slim-bookworm AS cpu
# Where the default index's torch carries CUDA, name an index of CPU builds: --build-arg TORCH_INDEX=URL
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=
# torch's C++ headers, its own tests and protoc go again: nothing here compiles.
RUN --mount=type=bind,from=wheel,source=/wheel,target=/tmp/wheel \
    --mount=type=bind,from=wheel,source=/source/requirements,target=/tmp/requirements umask 022 \
    && PIP_INDEX_URL="${TORCH_INDEX}" pip install --no-cache-dir "torch==${TORCH_VERSION}" \
    && pip install --no-cache-dir -c /tmp/requirements/python-3.11.txt "$(echo /tmp/wheel/*.whl)[wandb,parquet]" \
    && torch="$(python -c 'import importlib.util; print(*importlib.util.find_spec("torch").submodule_search_locations)')" \
    && rm -rf "${torch}/test" "${torch}/include" "${torch}/share/cmake" "${torch}"/bin/test_* "${torch}"/bin/*Test \
        "${torch}"/bin/protoc*
ENV HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /workspace
COPY --chmod=0755 pretrain_ssft.py ./
COPY --chmod=0755 tools ./tools
COPY --chmod=0755 examples ./examples
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron-ssft (CPU)" \
    org.opencontainers.image.description="Set Supervised Fine-Tuning (arXiv 2510.05132) on megatron-core" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="docker.io/library/python:3.11-slim-bookworm"
CMD ["/bin/bash"]

# torch 2.10, TransformerEngine 2.9 and apex: versions that megatron-core 0.16 is made for.
FROM nvcr.io/nvidia/pytorch:25.11-py3 AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The compiled stack is pinned to what the image carries; pip fails rather than replace any of it. Everything else comes
# from the lock. PIP_CONSTRAINT takes the place of the image's own file, which also pins pure-Python packages that have to
# be newer here.
RUN --mount=type=bind,from=wheel,source=/wheel,target=/tmp/wheel \
    --mount=type=bind,from=wheel,source=/source/requirements,target=/tmp/requirements umask 022 \
    && python -m pip list --format=freeze \
        | grep -iE '^(apex|flash[-_]attn|numpy|nvidia[-_]|(pytorch[-_])?triton|torch|transformer[-_]engine)' \
        > /tmp/compiled-stack.txt \
    && awk -F'[=@ ]+' '{ name = tolower($1); gsub("_", "-", name) } FNR == NR { carried[name] = 1; print; next } \
        !(name in carried)' /tmp/compiled-stack.txt /tmp/requirements/python-3.12.txt > /tmp/constraints.txt \
    && PIP_CONSTRAINT=/tmp/constraints.txt \
        python -m pip install --no-cache-dir "$(echo /tmp/wheel/*.whl)[wandb,parquet]" \
    && rm /tmp/compiled-stack.txt /tmp/constraints.txt
# Microbatches differ in length, over which torch's allocator would break up its memory.
ENV HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# The base image's entry point stays: it only prepares CUDA compatibility and executes its arguments.
WORKDIR /workspace
COPY --chmod=0755 pretrain_ssft.py ./
COPY --chmod=0755 tools ./tools
COPY --chmod=0755 examples ./examples
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron-ssft" \
    org.opencontainers.image.description="Set Supervised Fine-Tuning (arXiv 2510.05132) on megatron-core" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="nvcr.io/nvidia/pytorch:25.11-py3"
CMD ["/bin/bash"]
