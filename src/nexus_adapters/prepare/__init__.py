"""Prepare a training set: filter and resize images, extract structure maps, write WebDataset shards.

`source_kinds` opens the source, `plan.Plan` describes the set to make, and `run.prepare` makes it with one of
the `engines`, each of whose processes has a `worker.Worker`. `data.prepared_set` reads the result.
"""
