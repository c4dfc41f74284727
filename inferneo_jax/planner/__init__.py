"""What a model would take and give on hardware that need not be there."""
