"""Solvers: batched, certified, and unaware of models."""
