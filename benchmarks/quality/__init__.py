"""How accurate is what was trained, by method, size and option, beside LoRA and the papers?"""
