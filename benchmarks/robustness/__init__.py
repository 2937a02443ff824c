"""Does training stay right when it is killed, computed another way, or starts badly?"""
