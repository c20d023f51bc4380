"""Measurements: one script a question, results as JSON with the device."""
