"""Preparing a training set: images filtered, resized, with structure maps, in WebDataset shards.

`source_kinds` opens what the user names, `plan.Plan` says what to make of it, and `run.prepare` makes it with
one of the `engines`, whose processes each have a `worker.Worker`. `data.prepared_set` reads the result.
"""
