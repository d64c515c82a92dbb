# CPU:  docker build -t mmllm .
# CUDA: docker build -t mmllm --build-arg BASE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9-runtime --build-arg TORCH=cu130 .
ARG BASE=python:3.12-slim
FROM ${BASE}
# the kernels are compiled for the processor that they run on, when they are first used
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY requirements.txt .
# uv knows where torch for CPUs is: 0.2 GB in place of 3
ARG TORCH=cpu
RUN pip install --no-cache-dir uv && uv pip install --system --no-cache --torch-backend=${TORCH} -r requirements.txt
COPY mmllm mmllm
COPY configs configs
COPY train.py sample.py serve.py convert_weights.py ./
RUN useradd --create-home mmllm && mkdir /cache && chown mmllm /cache
USER mmllm
# The container listens to everyone who reaches its port, so it wants a key: docker run -e MMLLM_API_KEY=... -p 8000:8000 mmllm
# Without one only when asked for: -e MMLLM_REQUIRE_KEY=0
ENV HF_HOME=/cache XDG_CACHE_HOME=/cache MMLLM_REQUIRE_KEY=1
VOLUME ["/cache", "/app/outputs"]
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
CMD ["python", "serve.py", "--host", "0.0.0.0"]
