"""What is measured of the original: residuals, moments, directions, geometry."""
