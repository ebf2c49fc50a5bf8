"""Who sees whom, by slot: key j is visible to query i when j <= i + (T - S), and a mask narrows that.

Positions play no part here; they feed the mass. Three forms of the same rule: rows of a boolean mask for the
dense engine (rows.py), a bias for kernels that add one (bias.py), block indices for flex (blocks.py).
"""
