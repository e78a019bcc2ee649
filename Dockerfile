# lora-export from the pinned constraints. For the CPU, or with CUDA's libraries from their wheels:
#   docker build -t lora-export .
#   docker build --build-arg CUDA=1 -t lora-export:cuda .
#   docker run --rm -v "$PWD:/work" lora-export merge-and-export -b BASE -a ADAPTER -o OUT      (--gpus all for CUDA)
FROM python:3.11-slim-bookworm
ARG CUDA=0
# An index with torch for the CPU alone. Without one the image has CUDA's torch, which is ten times as large.
ARG TORCH_INDEX=
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/lora-export
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lora_export lora_export
# One pip call, so that torch is chosen together with what depends on it.
RUN if [ "$CUDA" = 1 ]; \
    then pip install --no-cache-dir -c constraints.txt '.[signing,triton]' 'onnxruntime-gpu[cuda,cudnn]'; \
    else pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} '.[signing,triton]'; \
    fi && lora-export env
RUN useradd --create-home user
USER user
WORKDIR /work
ENTRYPOINT ["lora-export"]
CMD ["--help"]
