# The overlay in an image, for those who cannot mount a folder. `make bundle` comes first: the build copies what it made, and
# needs no network beyond the base images.
#   make bundle && docker build -t vllm-overlay:v0.33.0 .
#       vLLM's own image and one layer on top: entry point, user and health check are as they were.
#   make bundle && docker build -t vllm-overlay-carrier:v0.33.0 --target carrier .
#       the folder alone, for an init container that copies it into a pod (deploy/kubernetes/).
# Another vLLM: --build-arg VLLM_VERSION=v0.32.0. Another image of it: --build-arg BASE=registry.example.org/vllm:tag.
ARG VLLM_VERSION=v0.33.0
ARG BASE=vllm/vllm-openai:${VLLM_VERSION}
ARG CARRIER_BASE=busybox:1.37

FROM ${BASE} AS folder
ARG BUNDLE=dist/vllm-overlay-0.1.0
# hadolint ignore=DL3002
USER 0:0
COPY ${BUNDLE} /opt/overlay
# Byte code is made here, because the folder is read-only for whoever runs it, and is used unchecked, because copying the
# folder changes the times. Others may read everything and write nothing: the overlay does not arm from a folder that others
# can write, and a checkout on a file system without modes has every mode.
RUN python3 -m compileall -q --invalidation-mode unchecked-hash /opt/overlay \
    && chmod -R u=rwX,go=rX /opt/overlay

FROM ${CARRIER_BASE} AS carrier
LABEL org.opencontainers.image.title="The auxiliary-stream overlay for vLLM, as a folder to copy" \
      org.opencontainers.image.licenses="Apache-2.0 AND BSD-2-Clause"
COPY --from=folder /opt/overlay /opt/overlay
USER 65534:65534

FROM ${BASE}
LABEL org.opencontainers.image.title="vLLM with the auxiliary-stream overlay" \
      org.opencontainers.image.licenses="Apache-2.0 AND BSD-2-Clause"
COPY --from=folder /opt/overlay /opt/overlay
ENV PYTHONPATH=/opt/overlay${PYTHONPATH:+:${PYTHONPATH}}
