"""What is computed once per E-step: conditioning, weights."""
