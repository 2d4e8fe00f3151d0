"""Results for ArviZ."""

from pyrobirds.inference_data.exporting import to_inference_data

__all__ = ["to_inference_data"]
