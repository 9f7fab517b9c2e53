"""What a model is worth: held-out loss, GLUE, attention maps."""
