"""Speed, memory and endurance: each module here that has a `main` is run as `python -m benchmarks.NAME`."""
