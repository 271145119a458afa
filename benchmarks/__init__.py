"""Tables of speed, each a module to run: python -m benchmarks.linear. Accuracy: python -m benchmarks.accuracy."""
