"""What bench.py is made of: the clock (which tune.py uses, too), pairs of models, predictions, other engines, tables, plots."""
