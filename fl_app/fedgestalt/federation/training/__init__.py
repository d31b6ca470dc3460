"""The training job: rounds of local training under secure aggregation."""
