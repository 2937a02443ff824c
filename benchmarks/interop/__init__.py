"""What does an adapter lose, weigh and cost on its way to PEFT, Transformers and llama.cpp?"""
