# The `openlm` command and the trainer, on the versions of constraints.txt. For a CPU:
#   docker build -t openlm .
# For NVIDIA GPUs (PyPI's torch for Linux comes with CUDA):
#   docker build -t openlm --build-arg TORCH_INDEX=https://pypi.org/simple .
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=s3,wandb,tensorboard,hf
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE constraints.txt ./
COPY openlm_pipeline openlm_pipeline
COPY train train
COPY assets assets
COPY orchestration orchestration
RUN python -m venv /opt/openlm && /opt/openlm/bin/python -m pip install --no-cache-dir \
      --extra-index-url "$TORCH_INDEX" -c constraints.txt ".[$EXTRAS]"

FROM python:${PYTHON}-slim-bookworm
# torch.compile needs a C++ compiler. Its version is the base image's.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 openlm && install -d -o openlm -g openlm /openlm
COPY --from=build /opt/openlm /opt/openlm
ENV PATH=/opt/openlm/bin:$PATH OPENLM_HOME=/openlm
USER 1000
WORKDIR /openlm
VOLUME /openlm
# A training command saves on Ctrl-C; as the first process of a container it would not see SIGTERM.
STOPSIGNAL SIGINT
ENTRYPOINT ["openlm"]
CMD ["--help"]
