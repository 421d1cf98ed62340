"""What bench.py is made of: timing, pairs of models, the speedup model, other engines, tables, plots."""
