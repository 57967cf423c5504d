"""Roundel: simulate every pipeline schedule on your hardware, pick the best, train with it."""
