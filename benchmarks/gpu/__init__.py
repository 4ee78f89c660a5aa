"""What only a machine with a GPU can answer, in one command: `python -m benchmarks.gpu`; see README.md."""
