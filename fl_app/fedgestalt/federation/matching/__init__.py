"""The matching job: ranked syndromes through a masked kernel."""
