# The gateway: no torch, no vLLM.  Build it through compose.yaml, or from the root of the checkout:
#   docker build -f compose/gateway.Dockerfile .
# The build arguments are explained in docs/compose.md, "Closed networks".
ARG BASE_IMAGE=python:3.11.15-slim-bookworm

FROM scratch AS extra
ARG EXTRA=compose/extra
COPY ${EXTRA}/ /

# pyproject.toml changes more often than what it asks for
FROM ${BASE_IMAGE} AS wanted
COPY pyproject.toml /
RUN python3 -c "import tomllib; p = tomllib.load(open('/pyproject.toml', 'rb')); \
print(*p['build-system']['requires'], *p['project']['dependencies'], sep='\n')" >/requirements.txt

FROM ${BASE_IMAGE}
ENV PATH=/opt/cairn/bin:$PATH PYTHONUNBUFFERED=1

WORKDIR /build
ARG PIP_INDEX_URL
COPY --from=wanted /requirements.txt .
RUN --mount=type=bind,from=extra,target=/extra \
    if [ -s /extra/ca.crt ]; then export PIP_CERT=/extra/ca.crt; fi \
    && python3 -m venv /opt/cairn \
    && pip install --no-cache-dir --find-links /extra -r requirements.txt

COPY pyproject.toml LICENSE ./
COPY gateway gateway
COPY router router
COPY cacheengine cacheengine
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

# the worker image has the same user id: they share the model volume
RUN useradd --uid 10001 --no-create-home cairn && install -d -o cairn -g cairn /models
USER 10001:10001
WORKDIR /
ENTRYPOINT ["cairn"]
CMD ["gateway", "--host", "0.0.0.0", "--admin-port", "8100"]
