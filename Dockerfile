# One image for docker, Kubernetes, Vertex AI and SageMaker; scripts/build_image.sh builds it.
#
# BASE needs Python 3.11 or newer and nothing of CUDA, which comes with PyTorch's wheels. The stages that compile may
# have another base with the same Python at the same place. With a base that has g++ and libgomp1, and INDEX_URL at a
# mirror, nothing but that mirror is asked.
ARG PYTHON_VERSION=3.11
ARG BASE=docker.io/library/python:${PYTHON_VERSION}-slim-bookworm
ARG BUILD_BASE=${BASE}


# Python in a virtual environment, where pip can install on any base.
FROM ${BUILD_BASE} AS build
ARG INDEX_URL=https://pypi.org/simple
ARG EXTRA_INDEX_URL=
ENV PIP_INDEX_URL=${INDEX_URL} PIP_EXTRA_INDEX_URL=${EXTRA_INDEX_URL} PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/venv


# llama.cpp from its pinned source, for any x86-64 CPU, or any arm64. LLAMA_CPP_FLAGS=-DGGML_CUDA=ON needs a BUILD_BASE
# with nvcc.
FROM build AS llama
ARG LLAMA_CPP_FLAGS=
# hadolint ignore=DL3008
RUN command -v c++ || { apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*; }
COPY scripts/build_llama_cpp.sh /build/scripts/
COPY scripts/llama_cpp /build/scripts/llama_cpp
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    XDG_CACHE_HOME=/build/cache PYTHON=/opt/venv/bin/python LLAMA_CPP_NATIVE=OFF bash /build/scripts/build_llama_cpp.sh \
    && cp -r /build/cache/quotesmith/llama.cpp/current/. /opt/llama.cpp \
    && find /opt/llama.cpp/bin -type f -exec strip --strip-unneeded {} + \
    && rm -r /build/cache


# What the lock names, every file by its hash; then less of it, and bytecode.
FROM build AS dependencies
ARG VARIANT=cuda
COPY scripts/image/${VARIANT}.lock /build/requirements.lock
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/venv/bin/pip install --no-deps --require-hashes --requirement /build/requirements.lock
COPY scripts/image/trim.sh /build/
# torch's py312_intrinsics.py is for newer Pythons than this one.
RUN bash /build/trim.sh /opt/venv \
    && /opt/venv/bin/python -m compileall -q -j 0 -x '/py3[0-9]+_' --invalidation-mode unchecked-hash /opt/venv/lib


# The program. It comes after everything that takes minutes.
FROM build AS program
COPY entrypoint.py pyproject.toml LICENSE README.md /opt/quotesmith/
COPY pipeline /opt/quotesmith/pipeline
RUN chmod -R a+rX /opt/quotesmith && python3 -m compileall -q --invalidation-mode unchecked-hash /opt/quotesmith


FROM ${BASE} AS runtime
# hadolint ignore=DL3008
RUN test -e "/usr/lib/$(uname -m)-linux-gnu/libgomp.so.1" \
    || { apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*; }
# Any user may write to /work, and nothing else is written to but /tmp; a volume for either begins as it is here.
RUN mkdir --mode 1777 /work
COPY --from=llama /opt/llama.cpp /opt/llama.cpp
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=program /opt/quotesmith /opt/quotesmith
ENV PATH=/opt/venv/bin:${PATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/work USER=quotesmith LOGNAME=quotesmith \
    QUOTESMITH_LLAMA_CPP=/opt/llama.cpp
USER 10001:10001
WORKDIR /work
ENTRYPOINT ["/opt/venv/bin/python", "/opt/quotesmith/entrypoint.py"]
CMD ["--help"]
ARG VERSION=unknown
ARG REVISION=unknown
ENV IMAGE_REVISION=${REVISION}
LABEL org.opencontainers.image.title="quotesmith" \
    org.opencontainers.image.description="Turns a bucket of quotes into one small GGUF model that speaks in that voice" \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"


# --target sagemaker: SageMaker's own folders under /opt/ml belong to root, and no setting of a job names another user
# (github.com/aws/sagemaker-python-sdk/pull/4325).
FROM runtime AS sagemaker
# hadolint ignore=DL3002
USER 0:0


# --target with-model: the base model inside, for jobs without any network.
FROM dependencies AS model
ARG BASE_MODEL=openai-community/gpt2
ARG BASE_REVISION=607a30d783dfa663caf39e06633721c8d4cfcd7e
ARG HF_ENDPOINT=https://huggingface.co
RUN /opt/venv/bin/python -c "import huggingface_hub as hub; hub.snapshot_download('${BASE_MODEL}', \
    revision='${BASE_REVISION}', local_dir='/opt/model', allow_patterns=['*.json', '*.txt', 'model*.safetensors'])" \
    && rm -rf /opt/model/.cache

FROM runtime AS with-model
COPY --from=model /opt/model /opt/model
ENV QUOTESMITH_MODEL_BASE=/opt/model


FROM runtime
