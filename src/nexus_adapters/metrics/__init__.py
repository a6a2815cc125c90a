"""Metrics: functions from arrays to numbers, confidence intervals, and a registry.

Register your own metric with `register_metric`; evaluations then compute and report it.
"""

from nexus_adapters.metrics.metric import METRICS, Generated, Metric, find_metric, register_metric

__all__ = ["METRICS", "Generated", "Metric", "find_metric", "register_metric"]
