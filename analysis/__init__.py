"""Reads finished runs and never makes them: tidy frames, gains, fits, figures, a report."""
