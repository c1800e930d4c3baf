"""Members: causal language models as softmeet sees them, hidden states and a softmax head."""
