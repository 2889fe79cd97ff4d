"""The work that bench.py times: contenders, and numeric checks for any device."""
