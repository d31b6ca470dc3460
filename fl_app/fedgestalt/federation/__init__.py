"""FLARE workflows, executors and messages; the only part of the core that imports nvflare."""
