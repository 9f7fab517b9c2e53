"""Corpora, tokenizer, memory-mapped token files, blocks and masking."""
