"""Batched solvers of the dual of ``meet``, with proved bounds on their error; they know heads, but no models."""
