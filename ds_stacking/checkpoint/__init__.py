"""Crash-safe checkpoints that any world size and any ZeRO stage can read: write, verify, select, prune."""
