"""Train metric-learning models on sparse QAConv scores against the nearest classes."""
