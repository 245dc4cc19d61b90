# The neighbour service.
#   docker build -f docker/service.Dockerfile --target cpu -t nearkin/service .
#   docker build -f docker/service.Dockerfile --target gpu -t nearkin/service:gpu .
# The gpu target brings FAISS with its own CUDA 12 libraries; the host needs the NVIDIA driver and container toolkit.
# Engine mixed needs PyTorch on GPUs, and gains from it where there is AMX; PyPI's brings gigabytes of CUDA libraries.
FROM docker.io/library/python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/nearkin
WORKDIR /src
COPY constraints.txt ./
COPY protos ./protos
COPY service ./service

FROM build AS build-cpu
ARG EXTRAS=tracing,mixed
RUN /opt/nearkin/bin/pip install --quiet -c constraints.txt ./protos "./service[cpu,$EXTRAS]"

FROM build AS build-gpu
ARG EXTRAS=tracing,mixed,torch
RUN /opt/nearkin/bin/pip install --quiet -c constraints.txt ./protos "./service[gpu,$EXTRAS]"

FROM docker.io/library/python:3.11-slim-bookworm AS runtime
# libgomp: FAISS's threads. The user's number is fixed so that volumes keep their owner across images.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends libgomp1 >/dev/null \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin nearkin \
    && install -d -o nearkin -g nearkin -m 0700 /data /run/nearkin
# Engine mixed keeps its compiled loops where a read-only root lets it.
ENV PATH=/opt/nearkin/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 NUMBA_CACHE_DIR=/tmp/numba
USER nearkin
VOLUME /data
EXPOSE 50051 50052 9100
STOPSIGNAL SIGTERM
ENTRYPOINT ["nearkin-serve"]
# Inside its container the service listens on every address; who reaches it is decided by what is published.
CMD ["--listen", "0.0.0.0:50051", "--bulk-port", "50052", "--insecure", "--listen", "unix:///run/nearkin/nearkin.sock", \
     "--http", "0.0.0.0:9100", "--data-dir", "/data"]

FROM runtime AS gpu
COPY --from=build-gpu /opt/nearkin /opt/nearkin

FROM runtime AS cpu
COPY --from=build-cpu /opt/nearkin /opt/nearkin
