"""Adapters: a method of PEFT in which the low-rank update of a frozen model obeys the constraint.

To read in this order: `config`, `layer` (a linear layer and its updates), `tuner` (how PEFT puts them into a model),
`verify` (loaded factors against τ), `gradient_start`, `lora` (the way out). `registration` makes PEFT know the method
when `hf_condlr` is imported. `lora_on_factors` and `lora_registration` are the other way round: PEFT's LoRA on layers
that are U S Vᵀ already.
"""
