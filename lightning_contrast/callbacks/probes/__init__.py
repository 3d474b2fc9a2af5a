"""Online linear probe and k-NN."""
