"""The rules of the essay: each chooses from the distributions that have every member's moments."""
