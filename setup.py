"""Packaging: `ds_stacking/` and, inside it, `kernels/` as `ds_stacking.kernels`.

A distribution named `kernels` exists and transformers imports it, so ours must not install under that name.
The link `ds_stacking/kernels` shows them to mypy, and to a checkout that is not installed.
"""

from setuptools import find_packages, setup

library = find_packages(include=["ds_stacking", "ds_stacking.*"])
kernels = ["ds_stacking.kernels", *(f"ds_stacking.kernels.{name}" for name in find_packages("kernels"))]

setup(
    name="ds-stacking",
    version="0.1.0",
    description="Pre-training Transformers by progressive stacking on DeepSpeed ZeRO engines",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*library, *kernels],
    package_dir={"ds_stacking.kernels": "kernels"},
    package_data={"ds_stacking.kernels": ["measured_tiles.json"]},
    # Floors: torch, transformers and deepspeed below these have known security faults.
    install_requires=[
        "torch>=2.10",
        "triton>=3.6; platform_system == 'Linux'",
        "deepspeed>=0.19",
        "transformers>=5.3",
        "tokenizers",
        "datasets>=4.0",
        "safetensors",
        "wandb",
        "wandb-workspaces",
        "docstring_parser",
        "numpy",
        "rich",
        "matplotlib",
        "scikit-learn",
        "scipy",
        "zstandard",
        "xxhash",
        "filelock",
        "huggingface_hub",
        "psutil",
        "pyarrow",
        "datasketch",
        "pydantic>=2",
        "typing_extensions",
    ],
    extras_require={"dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "mkdocs-material", "pre-commit"]},
)
