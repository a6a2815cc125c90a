"""Studies: train, evaluate and compare the methods, conditions and seeds of a plan."""
