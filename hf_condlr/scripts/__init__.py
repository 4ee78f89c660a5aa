"""What training scripts share: options, data, restarts, and what is saved."""
