"""What is built: segmenters, detectors, classifiers and several heads at once, and the bridges to other libraries."""
