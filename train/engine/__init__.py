"""What computes: images, a step, the epochs, and those who share them."""
