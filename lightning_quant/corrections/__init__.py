"""Changes of a calibrated model that make its int8 form more exact, without training."""
