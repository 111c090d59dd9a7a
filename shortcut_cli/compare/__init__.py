"""Comparison of architectures: arms and their baselines, the runs, the tests over seeds, and the page."""
