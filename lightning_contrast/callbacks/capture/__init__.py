"""Features, labels and batches that several callbacks read."""
