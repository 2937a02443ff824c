"""`lsr-scale init`: a look at one's model and data, and the commented YAML of a run on them.

`data_facts.py` and `model_facts.py` look, `template.py` writes. Nothing is fetched from a hub.
"""
