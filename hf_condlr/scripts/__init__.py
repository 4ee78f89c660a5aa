"""Code that training scripts share: options, data, resuming and saving."""
