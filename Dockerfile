# A container of ScaleDown. From a checkout:
#   docker build -t scaledown .
#   docker run --rm scaledown --version
# For an NVIDIA GPU, with vLLM, which chooses its own versions: docs/installation.md
FROM python:3.12-slim AS wheel
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir hatchling==1.33.0 \
    && python -m hatchling build -t wheel -d /wheel

FROM python:3.12-slim
# cpu, cu130 and others: uv knows where PyTorch publishes each of its builds, pip does not.
ARG TORCH_BACKEND=cpu
ARG EXTRAS="serve,s3,gs,openvino"
ARG CONSTRAINTS=/tmp/constraints.txt
COPY constraints.txt /tmp/
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir uv==0.13.9 \
    && uv pip install --system --no-cache --torch-backend "$TORCH_BACKEND" -c "$CONSTRAINTS" \
      "scaledown-rag[${EXTRAS}] @ file://$(echo /wheel/*.whl)" \
    && scaledown --version \
    && scaledown prepare --help > /dev/null \
    && python -c "import scaledown.student.model, scaledown.serving.app"
RUN useradd --create-home --uid 1000 scaledown
USER 1000
WORKDIR /home/scaledown
EXPOSE 8000
ENTRYPOINT ["scaledown"]
