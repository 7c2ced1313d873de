"""Outer optimisation: rounds of a stage's group as a replicated log (design section 9)."""
