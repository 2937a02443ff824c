"""How fast is a training step, how much memory does it take, and what would the hardware allow?"""
