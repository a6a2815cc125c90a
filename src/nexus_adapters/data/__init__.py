"""From data sets to samples and batches: sources, sizes, order, caches."""
