"""Studies: the methods, conditions and seeds of a plan, trained, evaluated and compared."""
