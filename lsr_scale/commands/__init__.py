"""The commands of `lsr-scale`, one a file: its options (`add_arguments`) and the call that they make (`run`).

Nothing heavy is imported at the top of these files: options are parsed, and help is shown, before torch is imported.
"""
