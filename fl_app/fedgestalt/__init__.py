"""Federated rare-disease face matching on NVIDIA FLARE. Research use only, not a diagnosis."""

from importlib.metadata import version

__version__ = version("fedgestalt")
RESEARCH_USE_ONLY = "Research use only, not a diagnosis."
