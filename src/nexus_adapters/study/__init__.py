"""Studies: a plan's methods, conditions and seeds, trained, evaluated and told in tables and plots."""
