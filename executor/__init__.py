"""Make it happen: the executor that runs a program's tasks on real devices."""
