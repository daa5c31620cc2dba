"""What a model costs and how well it does."""

from .macs import published_stage_macs, stage_macs


__all__ = ["published_stage_macs", "stage_macs"]
