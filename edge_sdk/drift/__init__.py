"""Drift monitors: one detector a file, all behind `DriftDetector`."""
