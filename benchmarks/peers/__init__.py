"""The systems that Roundel is compared with, one a file; `training.py` runs them."""
