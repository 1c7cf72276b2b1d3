# syntax=docker/dockerfile:1
# vLLM's own image with the overlay in it, for those who cannot mount a folder.
#   docker build --build-arg VLLM_VERSION=v0.33.0 -t vllm-overlay .
ARG VLLM_VERSION=v0.33.0
FROM vllm/vllm-openai:${VLLM_VERSION}

LABEL org.opencontainers.image.title="vLLM with the auxiliary-stream overlay" \
      org.opencontainers.image.licenses="Apache-2.0"

COPY --chmod=0755 sitecustomize.py /opt/overlay/
COPY --chmod=0755 overlay /opt/overlay/overlay
# wrapt is the one package that vLLM does not bring. Byte code is made here: the folder is read-only for whoever runs it.
RUN python3 -m pip install --no-cache-dir --target /opt/overlay "wrapt==2.5.2" \
    && python3 -m compileall -q /opt/overlay

ENV PYTHONPATH=/opt/overlay
