# megatron_vlm on NVIDIA's PyTorch image, which brings torch, Transformer Engine, Apex and flash-attn built for each other.
#
#   docker build -t megatron_vlm .                    (another base: --build-arg BASE=...)
#   docker run --rm -it --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/workspace" megatron_vlm \
#     python /opt/megatron_vlm/tools/doctor.py
#
# It runs as any user; /workspace is where data and runs belong, and nothing else is put there. The base must bring a torch
# in setup.py's range: the build ends with the doctor's report, and fails where it does not.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
# hadolint ignore=DL3006
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/megatron_vlm

# pip may add to the image, but replaces nothing that was compiled against its torch: these stay at the image's versions.
# The image's own list of constraints is wider, and would keep transformers and its companions out.
ENV PIP_CONSTRAINT=/opt/image-constraints.txt PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN touch "$PIP_CONSTRAINT" \
  && pip list --format freeze > /tmp/packages.txt \
  && grep -iE '^(torch|torchvision|pytorch[-_]triton|triton|numpy|apex|flash[-_]attn|transformer[-_]engine[^=]*|nvidia-[^=]*)==' \
    /tmp/packages.txt > "$PIP_CONSTRAINT" \
  && grep -q '^torch==' "$PIP_CONSTRAINT" \
  && rm /tmp/packages.txt

COPY . .
RUN pip install -e '.[data,test]'

# Any user may write here: runs where nothing is mounted, downloaded models, and what Python and torch want at home.
ENV HOME=/opt/home HF_HOME=/opt/cache/huggingface PYTHONUNBUFFERED=1
RUN mkdir -p /workspace "$HOME" "$HF_HOME" && chmod -R a+rwX /workspace "$HOME" "$HF_HOME"

USER 1000:1000
# Smoke test, as that user: torch is still the image's, what the image is for is there, and the doctor finds nothing broken.
RUN for package in transformer-engine apex flash-attn; do pip show --quiet "$package" || exit 1; done \
  && pip list --format freeze > /tmp/packages.txt \
  && grep -qxF "$(grep '^torch==' "$PIP_CONSTRAINT")" /tmp/packages.txt \
  && rm /tmp/packages.txt \
  && python -c 'import megatron_vlm; from megatron_vlm.config import load_config; load_config("examples/recipes/quickstart_phase1.yaml")' \
  && python tools/doctor.py
WORKDIR /workspace
