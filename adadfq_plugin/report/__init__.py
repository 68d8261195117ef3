"""What a user reads and looks at: numbers, words, curves, the samples."""

from adadfq_plugin.report.facts import Accuracy, Latency, Report, environment, measure_latency
from adadfq_plugin.report.render import write

__all__ = ["Accuracy", "Latency", "Report", "environment", "measure_latency", "write"]
