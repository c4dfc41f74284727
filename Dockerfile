# The server as an image: docs/deploy/README.md. `make image` builds it with the labels filled in.
#
#   EXTRAS    extras of pyproject.toml, with commas between: cuda12 | cuda13 | tpu, ray, ...
#   PACKAGES  further Debian packages, with blanks between: wget for KubeRay's probes
#   VERSION   of inferneo_jax/version.py, REVISION of git: for the labels
#   PYTHON    tag of the base image: the Debian that the tests run on, and a Python for which JAX has its newest version
ARG PYTHON=3.12-slim-bookworm

FROM python:${PYTHON} AS build
ARG EXTRAS="" VERSION=dev
WORKDIR /source
COPY . .
RUN written="$(python -c 'exec(open("inferneo_jax/version.py").read()); print(__version__)')" \
    && if [ "$VERSION" != dev ] && [ "$VERSION" != "$written" ]; then \
        echo "VERSION is $VERSION, and inferneo_jax/version.py says $written" >&2; exit 1; fi
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/inferneo \
    && /opt/inferneo/bin/pip install --disable-pip-version-check ".${EXTRAS:+[$EXTRAS]}"

FROM python:${PYTHON}
ARG PACKAGES="" VERSION=dev REVISION=""
LABEL org.opencontainers.image.title="Inferneo-JAX" \
    org.opencontainers.image.description="An OpenAI-compatible inference server on JAX" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"

# The CPU's kernels are compiled by the first start on each kind of CPU, and kept on /cache: compiled in here they would
# be for the CPU that builds the image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ ${PACKAGES} \
    && rm -rf /var/lib/apt/lists/*
# A volume that is made of these folders belongs to the user too.
RUN useradd --uid 10001 --user-group --create-home inferneo \
    && install --directory --owner inferneo --group inferneo --mode 0700 /models /cache /keys
COPY --from=build /opt/inferneo /opt/inferneo

# Keys are needed from the start: what a proxy or a mesh passes on in a pod comes from a loopback address, which
# without keys would be served.
ENV PATH=/opt/inferneo/bin:$PATH \
    INFERNEO_CHECKPOINTS=/models \
    INFERNEO_COMPILATION_CACHE=/cache/programs \
    INFERNEO_HOST=0.0.0.0 \
    INFERNEO_KEYS_DB=/keys/keys.db \
    INFERNEO_PORT=8000 \
    INFERNEO_REQUIRE_KEY=true \
    XDG_CACHE_HOME=/cache
USER 10001:10001
WORKDIR /home/inferneo
VOLUME ["/models", "/cache", "/keys"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "from http.client import HTTPConnection as Connection; from os import environ; \
        asked = Connection('127.0.0.1', int(environ['INFERNEO_PORT']), timeout=4); asked.request('GET', '/ready'); \
        raise SystemExit(asked.getresponse().status != 200)"]
# In this one process: as a container's first, Hypercorn's own command would end with exit code 0 when the server fails,
# because the kernel keeps from it the signal that server/exit.py sends.
CMD ["inferneo", "serve"]
