"""What work costs, on which machine, and what happened."""
