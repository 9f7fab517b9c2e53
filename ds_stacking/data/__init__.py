"""Corpora, tokenizer, memory-mapped token files, sequences and masking."""
