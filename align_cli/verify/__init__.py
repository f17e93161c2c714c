"""Algorithms held against what their papers prove: what `align verify` and the tests about optima look at."""
