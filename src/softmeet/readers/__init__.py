"""Readers: members that read texts, each in a row of its own, and predict the symbol that follows."""
