"""What completions are worth to GRPO, and what a run's `training.reward` names.

answers.py     the answer in a text: "#### 42", \\boxed{42}, the last number
shipped.py     exact_answer, multiple_choice, regex, length
user_file.py   a user's own function, `file.py:name`: found, hashed, loaded
checked.py     any of them as the trainer calls it, where what is no reward ends the run
"""
