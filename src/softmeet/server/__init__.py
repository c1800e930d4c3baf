"""The server: ensembles behind an OpenAI-compatible API, and a page that shows members and rule at each token."""
