"""Measurements: a script per question, results as JSON with the machine they were made on."""
