"""The published experiment of CondLR on MNIST (arXiv 2306.01485): `python -m studies.paper.table`."""
