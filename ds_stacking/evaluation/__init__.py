"""Held-out masked language modelling loss."""
