"""From datasets to samples and batches: sources, sizes, order, caches."""
