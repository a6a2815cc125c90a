"""From data sets to samples and batches: sources, geometry, order, caches."""
