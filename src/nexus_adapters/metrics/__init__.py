"""How results are measured: functions from arrays to numbers, how sure those numbers are, and their registry.

Register a metric of your own by `register_metric`; evaluations then compute and report it.
"""

from nexus_adapters.metrics.metric import METRICS, Generated, Metric, find_metric, register_metric

__all__ = ["METRICS", "Generated", "Metric", "find_metric", "register_metric"]
