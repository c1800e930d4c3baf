"""Rules: each chooses one distribution from the members'."""
