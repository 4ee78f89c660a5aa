"""Factors on several processes: rows of which each holds some, sums over them, and copies that must stay equal."""
