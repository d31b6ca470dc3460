"""What both ends of any job share: phases, handshake, watch, progress."""
