"""Structured output: what a text has to be, and the processes that compile it; it needs no model."""
