"""What people do with a consortium: submit, watch, rehearse, simulate."""
