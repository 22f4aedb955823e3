"""The experiments behind the chapters: one module a topic, each with its trial and its sweep.

A chapter runs a small part of a sweep and draws the whole of it from the CSV file that is kept in
`results/`. `python -m lora_lib.experiments.targets` runs a sweep; it goes on where it stopped.
"""
