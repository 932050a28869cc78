# Osler in a container, for GPUs and for CPU cores:
#   docker build --tag osler:cuda .
#   docker build --build-arg VARIANT=cpu --tag osler:cpu .
# The wheels of torch for GPUs bring CUDA's libraries along, and the driver is the machine's, so both have the same base.
ARG BASE=python:3.12.14-slim-bookworm@sha256:0f5b26b9518d002b6173fd61daad821fa340635ebfec5bba471013f9ca114579

FROM ${BASE} AS build
ARG VARIANT=cuda
WORKDIR /build
ENV PATH=/opt/osler/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY constraints.txt ./
RUN python -m venv /opt/osler
# Before the source, so that a change there does not fetch gigabytes again.
# hadolint ignore=DL3013
RUN torch="$(grep '^torch==' constraints.txt)" \
    && if [ "$VARIANT" = cpu ]; then pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"; fi \
    && pip install -c constraints.txt "$torch"
COPY pyproject.toml README.md LICENSE ./
COPY osler ./osler
RUN pip install -c constraints.txt '.[clean,export,fp8,hub,serve]'

FROM ${BASE}
# torch.compile calls a compiler, on GPUs too.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++=4:12.2.0-3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home osler \
    && install --directory --owner=osler --group=osler /osler
COPY --from=build /opt/osler /opt/osler
ENV PATH=/opt/osler/bin:$PATH PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /osler
ENTRYPOINT ["osler"]
CMD ["--help"]
