"""The rules of the essay: each chooses from the feasible set, the distributions with every member's moments."""
