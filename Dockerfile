# The course in a container: JupyterLab with every notebook, on an NVIDIA GPU or, without --gpus, on the CPU.
#
#   docker build -t mixprec-lab .
#   docker run --rm --gpus all -p 127.0.0.1:8888:8888 mixprec-lab
#
# PyTorch brings its own CUDA libraries, so the small base image is enough.  Transformer Engine compiles its extension
# and needs the compiler and the headers of the large one:
#
#   docker build -t mixprec-lab --build-arg TRANSFORMER_ENGINE=1 \
#     --build-arg CUDA_IMAGE=nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04 .
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04
FROM ${CUDA_IMAGE}
ARG TRANSFORMER_ENGINE=0

# git tells a measurement which commit it was made from; the compiler and Python.h are for Transformer Engine.
RUN apt-get update \
 && extra="" \
 && if [ "${TRANSFORMER_ENGINE}" = 1 ]; then extra="g++ python3-dev"; fi \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      ca-certificates git make python3 python3-venv ${extra} \
 && rm -rf /var/lib/apt/lists/*

# Not root: what a notebook runs should not own the container.
RUN useradd --create-home --shell /bin/bash reader && install -d -o reader /home/reader/course
USER reader
WORKDIR /home/reader/course
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# First what an install is made from, so that an edited page does not install everything again.
COPY --chown=reader Makefile requirements.txt requirements-gpu.txt requirements.lock pyproject.toml \
  README.md LICENSE LICENSE-TEXT.md ./
COPY --chown=reader tools tools
COPY --chown=reader mixprec_lab/__init__.py mixprec_lab/__init__.py
RUN make install
RUN if [ "${TRANSFORMER_ENGINE}" = 1 ]; then \
      .venv/bin/python -m pip install --no-build-isolation -r requirements-gpu.txt; \
    fi

COPY --chown=reader . .
RUN .venv/bin/python -m mixprec_lab doctor

EXPOSE 8888
CMD [".venv/bin/python", "-m", "jupyterlab", "--ip=0.0.0.0", "--no-browser", "book"]
