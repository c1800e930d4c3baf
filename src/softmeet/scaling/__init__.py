"""Engines, which run calls of a function: in this process, or on the workers of a Ray cluster."""
