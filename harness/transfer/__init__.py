"""What an encoder is worth: linear probe, few-shot, fine-tuning on the labelled set."""

from harness.transfer.run import run

__all__ = ["run"]
