"""Factors on several processes: rows held by each process, sums over the processes, and copies that must stay equal."""
