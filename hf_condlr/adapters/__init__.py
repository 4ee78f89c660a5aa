"""Adapters: PEFT and this package together."""
