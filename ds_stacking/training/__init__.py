"""The training loop and what stands around it: schedule, ledger, progress, tracking."""
