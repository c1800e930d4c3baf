"""Decoders: ways to write texts that are more than a draw of one token after another."""
