"""Speed and memory beside the peers: `python -m benchmarks.<name>`, or all of them with `make bench`."""
