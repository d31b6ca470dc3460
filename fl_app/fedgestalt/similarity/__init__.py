"""Private similarity: kernel agreement, sealed labels, Gram blocks, ranking and evaluation.

Pure functions and state machines over bytes and arrays. How encodings are masked is a plugin
(:class:`fedgestalt.contracts.MatchingStrategy`). Source of the kernel idea: FLAKE, Hannemann et al.
2023, "Privacy-Preserving Kernel Computation For Vertically Partitioned Data", and arXiv 2509.10635.
"""
