"""What a training step costs, and how long a method takes to a loss, beside the optimizers that people use."""
