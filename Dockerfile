# An image with the command `streamt2v`. Not built yet by anybody; tests/test_dockerfile.py runs its steps in an empty folder.
#
#   docker build -t streamt2v .
#   docker build -t streamt2v:cuda --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 --build-arg TORCH_INDEX= .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/videos" streamt2v generate "a red ball over the sea" -o ball.mp4
#   docker run --rm --gpus all -v "$PWD:/videos" -v streamt2v:/weights streamt2v:cuda weights pull streamingt2v
#
# BASE         anything with Python 3.11 or newer, or with apt-get to install it
# TORCH_INDEX  where torch comes from; empty takes the build of the package index, which brings its CUDA libraries
# EXTRAS       such as [metrics,ray]
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=
ARG PREFIX=/opt/streamt2v
ARG WEIGHTS=/weights
WORKDIR /src
RUN python3 -c "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))" || \
    { apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*; }
RUN python3 -m venv "$PREFIX"
RUN if [ -n "$TORCH_INDEX" ]; then "$PREFIX/bin/pip" install --no-cache-dir --index-url "$TORCH_INDEX" torch; fi
COPY LICENSE README.md pyproject.toml weights.toml ./
COPY streamt2v streamt2v
RUN "$PREFIX/bin/pip" install --no-cache-dir ".$EXTRAS"
RUN "$PREFIX/bin/streamt2v" weights verify demo
RUN mkdir -p "$WEIGHTS" && chmod 1777 "$WEIGHTS"
ENV PATH="${PREFIX}/bin:${PATH}" STREAMT2V_HOME=${WEIGHTS} HF_HOME=${WEIGHTS}/hub
WORKDIR /videos
ENTRYPOINT ["streamt2v"]
