"""What is wrong with the images, and which of them cannot be read."""
