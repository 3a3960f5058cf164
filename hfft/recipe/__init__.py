"""What the user asks for; imports neither torch nor transformers."""
