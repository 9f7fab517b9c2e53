"""Attention maps of an encoder, after every stage: where its heads look, and how copies part."""
