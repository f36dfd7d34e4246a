"""Runs scaling studies of vision pretraining: MAE, weakly supervised pretraining, transfer."""

__version__ = "0.1.0"
