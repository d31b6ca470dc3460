"""What a run leaves for people and programs: ``result.json`` and ``report.html``."""
