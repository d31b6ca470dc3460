"""What a site decides for itself, outside the reach of any job."""
