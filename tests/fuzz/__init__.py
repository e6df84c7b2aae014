"""Hostile input: what is sent (mutating, garbage), to whom (targets, bombarding), and what must hold (house)."""
