"""Pre-training Transformers by progressive stacking on DeepSpeed ZeRO engines."""

__version__ = "0.1.0"
