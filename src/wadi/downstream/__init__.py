"""What a one-step generator is for: an ordinary diffusers pipeline in, an ordinary diffusers pipeline out."""
