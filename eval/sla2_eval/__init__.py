"""Scoring, timing, statistics and reports for video generators."""
