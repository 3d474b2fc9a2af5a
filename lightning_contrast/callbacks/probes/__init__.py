"""Online linear probe and online k-NN."""
