# The server on NVIDIA GPUs, with plans built from an artifact that was exported with --format tensorrt. From the checkout's root:
#   docker build -f deploy/gpu.Dockerfile -t imagine-flash-gpu .
#   docker run --gpus all --user $(id -u) -e HOME=/tmp -v ./artifact:/artifact imagine-flash-gpu build-tensorrt /artifact
# (--user: the plans are written into your folder, which the image's own user may only read)
#   docker run --gpus all -v ./artifact:/artifact -p 127.0.0.1:8000:8000 imagine-flash-gpu serve --host 0.0.0.0 --model /artifact
FROM python:3.12-slim-bookworm AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
ARG DEBIAN_FRONTEND=noninteractive
# gcc: Triton compiles its launchers
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* && python3 -m venv /venv && useradd --system --uid 10001 --create-home imagine
ENV PATH=/venv/bin:$PATH
COPY --from=build /wheels /wheels
# hadolint ignore=DL3013
RUN set -- /wheels/*.whl \
    && pip install --no-cache-dir --extra-index-url https://pypi.nvidia.com "$1[serve,tensorrt]" && rm -r /wheels
USER 10001
ENV IMAGINE_FLASH_CACHE=/home/imagine/cache PYTHONUNBUFFERED=1
EXPOSE 8000
ENTRYPOINT ["imagine-flash"]
CMD ["serve", "--host", "0.0.0.0"]
