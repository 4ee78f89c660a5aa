"""The published experiments and our own: each module here that has a `main` is run as `python -m studies.NAME`."""
