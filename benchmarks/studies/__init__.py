"""The study that answers the essay: which rules are equivalent, and which are better, on known truths and on text."""
