"""Rules: each chooses one next-token distribution from the distributions of several members.

Symbols that docstrings of this package share: member i of n has the distribution p̂_i over v tokens and the head W_i,
(v, d_i), whose whitened form Q_i = (W_i - 1cᵀ) R_i has orthonormal columns; w_i is its weight in the pool q, ρ_i its
trust, λ_i its dual variables in the coordinates of W_i, ν_i those in the coordinates of Q_i, and r_i its distribution
after correction by ``meet``. Its moments are W_iᵀ p̂_i; the feasible set C is all p that have every member's moments.
p° is a rule's optimum. B counts rows.
"""
