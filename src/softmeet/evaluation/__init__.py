"""Evaluation of ensembles on text."""
