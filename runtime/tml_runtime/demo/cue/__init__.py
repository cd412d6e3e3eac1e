"""A model small enough to train on a laptop's CPU that really interacts: `python -m
tml_runtime.demo.train` makes its weights, `tml-runtime demo --preset cue` runs those that ship."""
