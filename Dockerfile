# One image for head, workers and submitter. The Python version is the one that the lock was made with.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
# CPU wheels by default; for CUDA 13: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY segcloud segcloud
RUN pip install --extra-index-url "${TORCH_INDEX}" -c requirements.lock .

FROM python:${PYTHON}-slim
LABEL org.opencontainers.image.title="segcloud" \
      org.opencontainers.image.description="CT segmentation from object storage to object storage on Ray" \
      org.opencontainers.image.licenses="Apache-2.0"
# a numeric user, so that Kubernetes can verify runAsNonRoot
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin segcloud
COPY --from=build /opt/venv /opt/venv
COPY jobs /app/jobs
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    SEGCLOUD_CACHE=/tmp/segcloud-cache
WORKDIR /app
USER 10001:10001
CMD ["python", "jobs/train.py", "--help"]
