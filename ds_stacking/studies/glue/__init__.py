"""Fine-tuning on GLUE: what an encoder is worth, beside baselines and the published scores."""
