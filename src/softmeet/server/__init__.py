"""Serving: ensembles behind the API that people already use, and a page to look inside."""
