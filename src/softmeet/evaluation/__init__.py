"""Evaluation of ensembles on text: documents, positions, scores, intervals, traces, fits and studies."""
