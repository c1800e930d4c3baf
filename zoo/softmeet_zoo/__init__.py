"""Hold the bundled members of softmeet: checkpoints of transformers in three families, and no code.

``softmeet.Ensemble.from_pretrained("wide")`` finds them here by name.
"""

__version__ = "0.2.0"
