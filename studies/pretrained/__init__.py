"""Real pretrained models, fine-tuned, compressed and trained again: `python -m studies.pretrained`."""
