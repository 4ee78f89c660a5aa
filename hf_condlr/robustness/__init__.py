"""Adversarial attacks, evaluation and metrics for any classifier of transformers, factored or not."""
