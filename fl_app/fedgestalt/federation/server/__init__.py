"""Components of the server, outside the reach of any job."""
