"""What people look at: overlays, predictions beside the truth, curves and tables."""
