"""From raw images to a training set: filtered, fitted, with structure maps, in WebDataset shards.

`plan.Plan` says what to make of a source, `run.prepare` makes it, by `workers.Worker` on one machine
(`local`) or many (`ray_engine`). `prepared_set.PreparedSet` reads the result.
"""
