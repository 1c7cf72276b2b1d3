# syntax=docker/dockerfile:1
# The overlay in an image, for those who cannot mount a folder.
#   docker build -t vllm-overlay:v0.33.0 --build-arg VLLM_VERSION=v0.33.0 .
#       vLLM's own image and one layer on top: entry point, user and health check are as they were.
#   docker build -t vllm-overlay-carrier:v0.33.0 --build-arg VLLM_VERSION=v0.33.0 --target carrier .
#       the folder alone, for an init container that copies it into a pod (deploy/kubernetes/).
ARG VLLM_VERSION=v0.33.0

FROM vllm/vllm-openai:${VLLM_VERSION} AS folder
# hadolint ignore=DL3002
USER 0:0
COPY sitecustomize.py LICENSE /opt/overlay/
COPY overlay /opt/overlay/overlay
# wrapt is the one package that vLLM does not bring. Byte code is made here, because the folder is read-only for whoever
# runs it, and is used unchecked, because copying the folder changes the times. Others may read everything and write nothing:
# the overlay does not arm from a folder that others can write.
RUN python3 -m pip install --no-cache-dir --no-deps --no-compile --target /opt/overlay "wrapt==2.5.2" \
    && find /opt/overlay -name __pycache__ -prune -exec rm -rf {} + \
    && python3 -m compileall -q --invalidation-mode unchecked-hash /opt/overlay \
    && chmod -R u=rwX,go=rX /opt/overlay

FROM busybox:1.37 AS carrier
LABEL org.opencontainers.image.title="The auxiliary-stream overlay for vLLM, as a folder to copy" \
      org.opencontainers.image.licenses="Apache-2.0 AND BSD-2-Clause"
COPY --from=folder /opt/overlay /opt/overlay
USER 65534:65534

FROM vllm/vllm-openai:${VLLM_VERSION}
LABEL org.opencontainers.image.title="vLLM with the auxiliary-stream overlay" \
      org.opencontainers.image.licenses="Apache-2.0 AND BSD-2-Clause"
COPY --from=folder /opt/overlay /opt/overlay
ENV PYTHONPATH=/opt/overlay${PYTHONPATH:+:${PYTHONPATH}}
