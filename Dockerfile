# influence with the CPU build of torch. TORCH_INDEX is PyTorch's index of CPU builds
# (pytorch.org, "Get started"); EXTRAS is hf, lightning, parquet, all, or some with commas between:
#
#   docker build -t influence --build-arg TORCH_INDEX=https://... --build-arg EXTRAS=hf .
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" influence score my_run
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps -w /wheels .

FROM python:${PYTHON}-slim
ARG TORCH_INDEX
ARG EXTRAS
COPY constraints.txt /tmp/
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    : "${TORCH_INDEX:?the CUDA build of torch takes gigabytes: give --build-arg TORCH_INDEX=https://...}" \
    && pip install --no-cache-dir -c /tmp/constraints.txt --index-url "$TORCH_INDEX" torch \
    && pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheels/*.whl)${EXTRAS:+[$EXTRAS]}" \
    && useradd --uid 1000 --create-home influence

# --user may name a user without a home folder
ENV HOME=/tmp
USER 1000
WORKDIR /work
ENTRYPOINT ["influence"]
CMD ["--help"]
