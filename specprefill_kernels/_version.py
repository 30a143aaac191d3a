"""The one place that says which version this is; setup reads it as text."""

__version__ = "0.1.0"
