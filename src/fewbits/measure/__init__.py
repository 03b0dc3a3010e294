"""What the saved bits cost: accuracy, size, memory, speed."""
