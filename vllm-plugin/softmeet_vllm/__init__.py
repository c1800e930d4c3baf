"""softmeet inside vLLM: its server mixes its model's next-token distributions with those of other models."""

__version__ = "0.2.0"
