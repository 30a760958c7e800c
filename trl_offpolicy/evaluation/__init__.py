"""Accuracy on benchmarks and the policy gap of a dataset, with intervals."""
