# One vLLM worker on the CPU with Cairn's cache inside.  Build it through compose.yaml, or from the root:
#   docker build -f compose/worker.Dockerfile .
# The build arguments are explained in docs/compose.md, "Closed networks".
ARG BASE_IMAGE=python:3.11.15-slim-bookworm

FROM scratch AS extra
ARG EXTRA=compose/extra
COPY ${EXTRA}/ /

# pyproject.toml changes more often than what it asks for, and what it asks for is 3 GB
FROM ${BASE_IMAGE} AS wanted
COPY pyproject.toml requirements/cpu.txt /
RUN python3 -c "import tomllib; p = tomllib.load(open('/pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies']['cpu'], sep='\n')" >/requirements.txt \
    && grep '^\./' /cpu.txt >>/requirements.txt

FROM ${BASE_IMAGE}
ENV PATH=/opt/cairn/bin:$PATH PYTHONUNBUFFERED=1
# g++ builds csrc here, and vLLM's kernels at the first start; libnuma is vLLM's
RUN apt-get update && apt-get install -y --no-install-recommends g++ libnuma1 && rm -rf /var/lib/apt/lists/*

WORKDIR /build
ARG PIP_INDEX_URL
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements/stubs requirements/stubs
COPY --from=wanted /requirements.txt .
# As requirements/install.sh: this setuptools builds the stubs and Cairn itself, and TORCH_INDEX is asked only
# when torch is nowhere else.
RUN --mount=type=bind,from=extra,target=/extra \
    if [ -s /extra/ca.crt ]; then export PIP_CERT=/extra/ca.crt; fi \
    && export PIP_NO_CACHE_DIR=1 PIP_FIND_LINKS="/extra /tmp/torch" \
    && mkdir /tmp/torch \
    && python3 -m venv /opt/cairn \
    && pip install 'setuptools==78.1.1' \
    && if pip download -q --no-deps -d /tmp/torch 'torch==2.13.0+cpu'; then TORCH_INDEX=; fi \
    && pip install --no-build-isolation ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r requirements.txt \
    && rm -r /tmp/torch

COPY pyproject.toml LICENSE ./
COPY csrc csrc
COPY gateway gateway
COPY router router
COPY cacheengine cacheengine
RUN python -m cacheengine.build && pip install --no-cache-dir --no-deps --no-build-isolation .

# /models: shared, filled by the `model` service.  /data: the disk tier and vLLM's compiled kernels.
RUN useradd --uid 10001 --no-create-home --home-dir /data cairn && install -d -o cairn -g cairn /data /models
USER 10001:10001
WORKDIR /
ENTRYPOINT ["cairn"]
CMD ["worker", "--host", "0.0.0.0"]
