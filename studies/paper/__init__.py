"""The published experiments of CondLR (arXiv 2306.01485): `python -m studies.paper.table`."""
