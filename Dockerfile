# A container of ScaleDown. From a checkout:
#   docker build -t scaledown .
#   docker run --rm scaledown --version
# PyTorch is what the package index gives for Linux: its CUDA build. For a smaller image without CUDA, pass the
# address of PyTorch's own CPU packages (pytorch.org names it):
#   docker build --build-arg TORCH_INDEX=ADDRESS -t scaledown .
FROM python:3.12-slim AS wheel
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir hatchling==1.33.0 \
    && python -m hatchling build -t wheel -d /wheel

FROM python:3.12-slim
ARG TORCH_INDEX=""
ARG EXTRAS="serve,s3,gs"
# torch comes first and alone, so that nothing else chooses its build.
COPY constraints.txt /tmp/
RUN pip install --no-cache-dir -c /tmp/constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir -c /tmp/constraints.txt "scaledown-rag[${EXTRAS}] @ file://$(echo /wheel/*.whl)" \
    && scaledown --version \
    && scaledown prepare --help > /dev/null \
    && python -c "import scaledown.student.model, scaledown.serving.app"
RUN useradd --create-home --uid 1000 scaledown
USER 1000
WORKDIR /home/scaledown
EXPOSE 8000
ENTRYPOINT ["scaledown"]
